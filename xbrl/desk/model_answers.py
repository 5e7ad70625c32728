"""Ask a model about reports: the questions of its training, answered in batches over the ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from transformers import AutoConfig, PreTrainedTokenizerBase

from common.errors import UserError
from data.chat_template import read_chat_settings
from data.encoding import ExampleEncoder, control_line
from data.tokens import load_tokenizer
from distributed.process_group import Ranks, read_on_first, start_process_group
from eval.generate import answer_work, greedy_answers, stop_tokens
from eval.load_over_ranks import agreed_dtype, is_sharded, load_causal_lm
from eval.over_ranks import TIMEOUT_MINUTES, compute_over_ranks
from xbrl.corpus.examples import Profile
from xbrl.desk.analysis import Analysis, Options, batches, versions, with_replies
from xbrl.desk.record import Case, Reply
from xbrl.read.dpm import load_cells


@dataclass(frozen=True)
class Asking:
    """How a model is asked. `source` says where its profile is recorded."""

    model: Path
    profile: Profile
    source: str
    max_new_tokens: int
    batch_size: int
    dtype: str

    def for_key(self) -> dict:
        """What changes the answers."""
        return {"profile": self.profile.name, "max_new_tokens": self.max_new_tokens, "dtype": self.dtype}


class Questions:
    """Turns cases into prompts; says which ones cannot be asked."""

    def __init__(self, asking: Asking) -> None:
        self.asking = asking
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(str(asking.model))
        self.encoder = ExampleEncoder(self.tokenizer, read_chat_settings(asking.model))
        config = AutoConfig.from_pretrained(asking.model)
        self.context = getattr(config, "max_position_embeddings", None) or math.inf

    def question(self, case: Case) -> tuple[Reply, list[int]]:
        """(the reply without its text, the token ids of the prompt). Without ids the reply says why it cannot be asked."""
        profile, longest = self.asking.profile, self.asking.max_new_tokens
        if problem := profile.why_not(case.report):
            return Reply(profile.name, problem=problem), []
        messages = profile.question(case.report, case.bank, load_cells(), case.earlier)
        spelled = tuple(dict.fromkeys(self.encoder.control_tokens_in({"messages": messages})))
        reply = Reply(profile.name, tuple(messages), control_tokens=spelled)
        try:
            ids = self.encoder.prompt(messages)
        except UserError as error:
            return replace(reply, problem=str(error)), []
        if len(ids) + longest > self.context:
            problem = (
                f"it is too long: {len(ids)} tokens and an answer of up to {longest} do not fit into the model's context of "
                f"{self.context}"
            )
            return replace(reply, problem=problem), []
        return reply, ids

    def replies(self, asked: Sequence[tuple[Reply, list[int]]], answers: Sequence[list[int]]) -> list[Reply]:
        """The replies of a batch, with the `answers` to those that could be asked."""
        texts = iter(answers)
        return [self._reply(reply, next(texts)) if ids else reply for reply, ids in asked]

    def _reply(self, reply: Reply, answer: list[int]) -> Reply:
        text = str(self.tokenizer.decode(answer, skip_special_tokens=True))
        return replace(reply, text=text.strip(), cut_short=len(answer) == self.asking.max_new_tokens)


def analyse_over_ranks(options: Options, asking: Asking) -> int:
    """The whole analysis with a model. A collective; rank 0 reads, judges and writes, all ranks answer.

    Returns the exit code. Under torchrun, which takes any other code for a failed process, findings give 0.
    """
    ranks = start_process_group(TIMEOUT_MINUTES)
    state: dict = {}  # of rank 0

    def prepare() -> list[int]:
        state["analysis"] = Analysis(options, versions(asking.model), asking.for_key())
        state["questions"] = Questions(asking)
        cases = state["analysis"].prepare()
        print(f"profile {asking.profile.name} (from {asking.source}); {len(cases)} reports to ask about", flush=True)
        state["groups"] = list(batches(cases, asking.batch_size * ranks.world_size))
        return [len(group) for group in state["groups"]]

    sizes = read_on_first(prepare, ranks)
    if sizes:
        _answer(asking, sizes, state, ranks)

    def end() -> int:
        records = state["analysis"].records
        if places := [f"{one['entity']} {one['period']}" for one in records if one["control_tokens"]]:
            print(control_line(len(places), places, "report"))
        return state["analysis"].end()

    code = read_on_first(end, ranks)
    dist.destroy_process_group()
    return 0 if code == 1 and ranks.world_size > 1 else code


def _answer(asking: Asking, sizes: Sequence[int], state: dict, ranks: Ranks) -> None:
    """Answer the groups of reports one after the other. Each is written before the next is asked."""
    dtype = agreed_dtype(asking.dtype, ranks)
    sharded = is_sharded("auto", [str(asking.model)], ranks)
    model, finish = load_causal_lm(str(asking.model), dtype, sharded, ranks)
    taught = read_on_first(lambda: state["questions"].encoder.stop_ids, ranks)
    stop_ids = stop_tokens(model, taught)
    for number in range(len(sizes)):

        def ask(number: int = number) -> list[list[int]]:
            state["asked"] = [state["questions"].question(case) for case in state["groups"][number]]
            return [ids for _, ids in state["asked"] if ids]

        prompts = read_on_first(ask, ranks)
        answers: list[list[int]] = []
        if prompts:
            answers = compute_over_ranks(
                lambda share, advance: greedy_answers(
                    model, share, stop_ids, asking.max_new_tokens, asking.batch_size, advance
                ),
                prompts,
                answer_work(model, prompts, asking.max_new_tokens),
                ranks,
                f"answers {number + 1}/{len(sizes)}",
                finish,
            )

        def write(number: int = number, answers: Sequence[list[int]] = answers) -> None:
            replies = state["questions"].replies(state["asked"], answers)
            state["analysis"].write(with_replies(state["groups"][number], replies))

        read_on_first(write, ranks)
