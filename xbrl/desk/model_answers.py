"""Ask a model about reports: the questions of its training, answered in batches over the ranks."""

import math
from collections.abc import Generator
from dataclasses import replace
from functools import partial

import torch.distributed as dist
from transformers import AutoConfig, PreTrainedTokenizerBase

from common.errors import UserError
from data.chat_template import read_chat_settings
from data.encoding import ExampleEncoder, control_line
from data.tokens import load_tokenizer
from distributed.process_group import read_on_first, start_process_group
from eval.generate import greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import TIMEOUT_MINUTES, compute_over_ranks
from xbrl.desk.analysis import Analysis, Options, versions
from xbrl.desk.record import Case, Reply
from xbrl.read.dpm import load_cells


class Questions:
    """The prompts of cases, and the replies to them."""

    def __init__(self, options: Options) -> None:
        self.profile, self.longest = options.profile, options.max_new_tokens
        model = str(options.model)
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(model)
        self.encoder = ExampleEncoder(self.tokenizer, read_chat_settings(model))
        config = AutoConfig.from_pretrained(model).get_text_config()
        self.context = getattr(config, "max_position_embeddings", None) or math.inf

    def question(self, case: Case) -> tuple[Reply, list[int]]:
        """Return (the reply without its text, token ids of the prompt).

        If the case cannot be asked, the reply gives the reason and there are no ids.
        """
        if problem := self.profile.why_not(case.report):
            return Reply(self.profile.name, problem=problem), []
        messages = self.profile.question(case.report, case.bank, load_cells(), case.earlier)
        spelled = tuple(dict.fromkeys(self.encoder.control_tokens_in({"messages": messages})))
        reply = Reply(self.profile.name, tuple(messages), control_tokens=spelled)
        try:
            ids = self.encoder.prompt(messages)
        except UserError as error:
            return replace(reply, problem=str(error)), []
        if len(ids) + self.longest > self.context:
            room = f"{len(ids)} tokens and an answer of up to {self.longest} do not fit into the model's context of {self.context}"
            return replace(reply, problem=f"it is too long: {room}"), []
        return reply, ids

    def reply(self, reply: Reply, answer: list[int]) -> Reply:
        """Return the reply with the text of an answer."""
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return replace(reply, text=text.strip(), cut_short=len(answer) == self.longest)


def analyse_over_ranks(options: Options) -> int:
    """Analyse the reports with a model. A collective: rank 0 reads, judges and writes, all ranks answer.

    Returns the exit code. Under torchrun, which takes any other code for a failed process, findings give 0.
    """
    ranks = start_process_group(TIMEOUT_MINUTES)
    rounds = _rounds(options, ranks.world_size)  # only rank 0 runs it
    model, stop, answers = None, None, None
    while not isinstance(step := read_on_first(lambda answers=answers: rounds.send(answers), ranks), int):
        prompts, taught, label = step
        if model is None:
            sharded = is_sharded("auto", [str(options.model)], ranks)
            model, stop = load_causal_lm(str(options.model), agreed_dtype(options.dtype, ranks), sharded, ranks)
        answer = partial(
            greedy_answers,
            model,
            stop_ids=stop_tokens(model, taught),
            max_new_tokens=options.max_new_tokens,
            stop=stop,
        )
        tokens = [len(prompt) + options.max_new_tokens for prompt in prompts]
        answers = compute_over_ranks(answer, prompts, tokens, ranks, label, stop, options.batch_size)
    dist.destroy_process_group()
    return 0 if step == 1 and ranks.world_size > 1 else step


def _rounds(options: Options, world_size: int) -> Generator[tuple | int, list[list[int]] | None]:
    """Rank 0's side: yields (prompts, stop tokens, label) and is sent the answers, group after group; at last the exit code.

    Each group of reports is written before the next one is asked.
    """
    how = {"profile": options.profile.name, "max_new_tokens": options.max_new_tokens, "dtype": options.dtype}
    analysis = Analysis(options, versions(options.model), how)
    questions = Questions(options)
    cases = analysis.prepare()
    print(f"profile {options.profile.name} (from {options.source}); {len(cases)} reports to ask about", flush=True)
    size = options.batch_size * world_size
    for start in range(0, len(cases), size):
        group = cases[start : start + size]
        asked = [questions.question(case) for case in group]
        prompts = [ids for _, ids in asked if ids]
        label = f"answers {start // size + 1}/{math.ceil(len(cases) / size)}"
        answers = (yield prompts, questions.encoder.stop_ids, label) if prompts else None
        texts = iter(answers or [])
        replies = [questions.reply(reply, next(texts)) if ids else reply for reply, ids in asked]
        analysis.write([replace(case, reply=reply) for case, reply in zip(group, replies, strict=True)])
    if places := [f"{one['entity']} {one['period']}" for one in analysis.records if one["control_tokens"]]:
        print(control_line(len(places), places, "report"))
    yield analysis.end()
