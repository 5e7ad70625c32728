"""The GGUF file of an export for llama.cpp, and a Modelfile for Ollama.

llama.cpp's own convert_hf_to_gguf.py converts; this file calls it, reads the result back and describes the chats to Ollama.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from common.durable_files import new_directory
from common.errors import UserError
from data.chat_template import ChatSettings, ChatTemplate
from training.ending import EXPORT_AGAIN, GENERATION_CONFIG, read_json

OUT_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
LEAST_CONTEXT = 8192  # tokens: Ollama drops the oldest messages of a longer chat without a warning


@dataclass(frozen=True)
class ChatPieces:
    """The text around the messages of a chat, as far as Ollama's templates can express it.

    A chat is `opening`, then each message between its role's two texts. system: Ollama puts it first if a chat has no system
    message; "" for none. The text after a user's message includes the beginning of the assistant's answer.
    """

    opening: str
    around: dict[str, tuple[str, str]]
    system: str = ""

    def render(self, messages: list[tuple[str, str]]) -> str:
        """Return the prompt of (role, content) pairs as Ollama writes it."""
        if self.system and messages[0][0] != "system":
            messages = [("system", self.system), *messages]
        return self.opening + "".join(self.around[role][0] + text + self.around[role][1] for role, text in messages)

    def modelfile(self, gguf: str, stops: list[str], context: int) -> str:
        """Return a Modelfile with greedy decoding. context: tokens."""
        branches = [
            f'{{{{ {word} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for word, (role, (before, after)) in zip(("if", "else if", "else if"), self.around.items(), strict=True)
        ]
        loop = "{{ range .Messages }}" + "".join(branches) + "{{ end }}{{ end }}"
        lines = [f"FROM ./{gguf}", f'TEMPLATE """{self.opening}{loop}"""']
        lines += [f'SYSTEM """{self.system}"""'] if self.system else []
        lines += [f'PARAMETER stop "{stop}"' for stop in stops]
        # Without a repeat_penalty of 1, some versions of Ollama penalize repeated tokens, so that decoding is not greedy.
        lines += [f"PARAMETER num_ctx {context}", "PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
        return "\n".join(lines) + "\n"


def read_pieces(template: ChatTemplate, stops: list[str], bos: str) -> ChatPieces | None:
    """Return the pieces of a chat template, or None if Ollama cannot reproduce its prompts.

    A template that depends on more than the roles, such as one that rewrites earlier turns, has none. stops: end tokens. bos:
    the token that the server itself puts before a prompt, so that the pieces leave it out; "" for none.
    """

    def render(messages: list[tuple[str, str]]) -> str:
        chat = [{"role": role, "content": text} for role, text in messages]
        return template.render(chat, prompt=True).removeprefix(bos)

    roles = {"Zsystem": "system", "Zfirst": "user", "Zanswer": "assistant", "Zsecond": "user"}
    chat = [(role, text) for text, role in roles.items()]
    try:
        rest, texts = render(chat), []
        for _, text in chat:
            before, _, rest = rest.partition(text)
            texts.append(before)
        alone = render(chat[1:2]).partition("Zfirst")[0]
        to_system, to_first, to_answer, to_second = texts
        user = os.path.commonprefix([text[::-1] for text in (alone, to_first, to_second)])[::-1]
        for stop in stops:
            user = user.rpartition(stop)[2].removeprefix("\n")  # an end token belongs to the message that it ends
        after_system = to_first.removesuffix(user)
        around = {"user": (user, rest), "assistant": (to_answer.removeprefix(rest), to_second.removesuffix(user))}
        default = alone.removeprefix(to_system).removesuffix(after_system + user)
        if alone == to_system + default + after_system + user:
            pieces = ChatPieces("", {"system": (to_system, after_system), **around}, default)
        else:
            opening = alone.removesuffix(user)
            pieces = ChatPieces(opening, {"system": (to_system.removeprefix(opening), after_system), **around})
        chats = [chat[1:2], chat[:2], chat[1:], chat, [*chat[1:3], *chat[1:]], [*chat, *chat[2:]]]
        if any(render(messages) != pieces.render(messages) for messages in chats):
            return None
    except UserError:  # the template refuses a system message
        return None
    literals = [pieces.opening, pieces.system, *(text for pair in pieces.around.values() for text in pair), *stops]
    return None if any(mark in text for text in literals for mark in ("{{", '"')) else pieces


def write_gguf(
    out: Path, converter: Path, tokenizer: PreTrainedTokenizerBase, chats: ChatSettings, dtype: str, context: int
) -> list[str]:
    """Convert the export `out`, write a Modelfile, and return lines for the user. The directory is `out` with "-gguf" appended.

    converter: convert_hf_to_gguf.py. dtype: of the export. context: the longest chat in tokens. Raise UserError if the
    conversion fails, or if the file read back has another template, another end token or no tensor; then nothing is written.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError("--gguf reads the file back with the package gguf: pip install 'gguf>=0.17'") from error
    target = gguf_directory(out)
    with new_directory(target) as folder:
        path = folder / f"{out.name}.gguf"
        command = [sys.executable, converter, out, "--outtype", OUT_TYPES[dtype], "--outfile", path]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace")
        if done.returncode or not path.is_file():
            last = (done.stderr.strip() or done.stdout.strip() or "it wrote no file").splitlines()[-1]
            raise UserError(f"{converter} did not convert {out}: {last}")
        reader = GGUFReader(str(path))
        fields = {name: field.contents() for name, field in reader.fields.items() if not name.endswith(".merges")}
        template, stop_ids = (
            ChatTemplate(tokenizer, chats),
            read_json(out / GENERATION_CONFIG, EXPORT_AGAIN)["eos_token_id"],
        )
        if fields.get("tokenizer.chat_template") != template.text():
            raise UserError(f"{converter} wrote another chat template than {out} has; update llama.cpp")
        if (end := fields.get("tokenizer.ggml.eos_token_id")) not in stop_ids:
            raise UserError(f"{converter} wrote the end token {end}, but answers end with {stop_ids}")
        if not reader.tensors:
            raise UserError(f"{converter} wrote a file without tensors")
        lines = [f"{len(reader.tensors)} tensors in {dtype} -> {target / path.name}"]
        stops = [str(tokenizer.convert_ids_to_tokens(token)) for token in stop_ids]
        bos = str(tokenizer.bos_token) if fields.get("tokenizer.ggml.add_bos_token") else ""
        if pieces := read_pieces(template, stops, bos):
            (folder / "Modelfile").write_text(pieces.modelfile(path.name, stops, context), encoding="utf-8")
            lines.append(f"for Ollama: ollama create {out.name} -f {target / 'Modelfile'}")
        else:
            lines.append("no Modelfile: Ollama cannot express this chat template; llama-server --jinja reads it itself")
    return lines


def gguf_directory(out: Path) -> Path:
    """Return the directory beside the export `out`, which stays as it is signed, pushed and verified."""
    return out.with_name(f"{out.name}-gguf")
