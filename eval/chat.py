"""Talk to one or several models in the terminal. Each model answers every question in its own conversation."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from common.errors import UserError
from data.chat_template import read_chat_settings
from data.encoding import ExampleEncoder
from data.tokens import load_tokenizer
from eval.generate import Sampling, greedy_answers, load_for_generation, sampled_answers, stop_tokens
from model.architectures import check_model_directory

AGAIN, END = "/new", "/quit"


class Speaker:
    """A model and its conversation. Prompts are encoded as in training: content is never a control token."""

    def __init__(self, path: str, system: str, dtype: torch.dtype, device: torch.device) -> None:
        """Raise UserError unless `path` has a tokenizer and a model, or an adapter whose base weights are on this machine."""
        if not Path(path, "adapter_config.json").is_file():
            check_model_directory(path)
        self.path = path
        self.tokenizer = load_tokenizer(path)
        self.encoder = ExampleEncoder(self.tokenizer, read_chat_settings(path))
        self.model: PreTrainedModel = load_for_generation(path, dtype, device)
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)

    def answer(self, question: str, max_new_tokens: int, sampling: Sampling | None) -> str:
        """Answer the next question, greedily without `sampling`. Question and answer become part of the conversation.

        Raises UserError if the chat template refuses the conversation, or if it is longer than the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        prompt = self.encoder.prompt(messages)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions and len(prompt) + max_new_tokens > positions:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and with {max_new_tokens} more it exceeds the {positions} "
                f"positions of {self.path}; begin again with {AGAIN}"
            )
        stops = stop_tokens(self.model, self.encoder.stop_ids)
        if sampling is None:
            ids = greedy_answers(self.model, [prompt], stops, max_new_tokens)[0]
        else:
            ids = sampled_answers(self.model, [prompt], [len(messages)], stops, max_new_tokens, sampling)[0]
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text + (" ..." if len(ids) == max_new_tokens else "")

    def begin_again(self) -> None:
        """Forget the conversation, except for the system prompt."""
        self.messages = list(self.start)


def talk(
    speakers: list[Speaker],
    questions: Iterable[str],
    max_new_tokens: int,
    sampling: Sampling | None,
    say: Callable[[str], None],
) -> None:
    """Answer each line of `questions` with every model in turn. If a question cannot be asked, show the error and go on."""
    width = max(len(speaker.path) for speaker in speakers)
    for question in map(str.strip, questions):
        if question == END:
            return
        if not question:
            continue
        for speaker in speakers:
            if question == AGAIN:
                speaker.begin_again()
                continue
            try:
                text = speaker.answer(question, max_new_tokens, sampling)
            except UserError as error:
                text = f"error: {error}"
            say(f"{speaker.path:{width}} | " + text.replace("\n", "\n" + " " * width + " | "))
        say("")
