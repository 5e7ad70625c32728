"""Talk to one or several models in the terminal: each of them answers every question, in the conversation that it has had itself."""

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
    """A model, and the conversation that it has had. Its prompts are those of training: content is never a control token."""

    def __init__(self, path: str, system: str, dtype: torch.dtype, device: torch.device) -> None:
        """Raises UserError if `path` is not the directory of a model, or of an adapter on weights that are here, with a tokenizer."""
        if not Path(path, "adapter_config.json").is_file():
            check_model_directory(path)
        self.path = path
        self.tokenizer = load_tokenizer(path)
        self.encoder = ExampleEncoder(self.tokenizer, read_chat_settings(path))
        self.model: PreTrainedModel = load_for_generation(path, dtype, device)
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages = list(self.start)

    def answer(self, question: str, max_new_tokens: int, sampling: Sampling | None) -> str:
        """The answer to the next question; greedy without `sampling`. Both are kept for the questions that follow.

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
        """Forget the conversation, but for the system prompt."""
        self.messages = list(self.start)


def talk(
    speakers: list[Speaker],
    questions: Iterable[str],
    max_new_tokens: int,
    sampling: Sampling | None,
    say: Callable[[str], None],
) -> None:
    """Answer each line of `questions` with every model in turn. A question that cannot be asked is said, and passed over."""
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
