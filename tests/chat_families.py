"""The structure of the chat templates of public model families, in templates of our own, and tokenizers for them.

The purpose of each template stands beside it: the text before and after an answer, and the changes to a turn that is no longer
the last. The wording of system prompts and tool instructions does not matter here and is left out.
"""

import functools
from dataclasses import dataclass

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import SENTENCES

# @CALL in a template stands for a tool call `c` as JSON, inside a text.
CALL = '{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) ~ \'}'


@dataclass(frozen=True)
class Family:
    """A template with its special tokens. kind: byte (byte-level BPE), sentencepiece (dummy prefix) or legacy (a prefix before
    every piece between special tokens). adds_bos: whether the tokenizer puts its BOS, if it has one, before a text. stops: the
    tokens besides EOS that end an answer, as in the family's generation_config.json. added: more tokens, which are not special.
    rstrip: whether special tokens absorb the white space after them."""

    template: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None
    kind: str = "byte"
    adds_bos: bool = True
    stops: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    rstrip: bool = False


# The thinking of a message `m` may stand beside its content, or between tags at the beginning of its content.
THOUGHT = (
    "{% set content = (m.content or '').split('</think>')[-1].strip() %}{% set thought = m.reasoning_content or "
    "((m.content or '').split('</think>')[0].split('<think>')[-1].strip() if '</think>' in (m.content or '') else '') %}"
)
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
GLM_TOKENS = ("[gMASK]", "<sop>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
MISTRAL_TOKENS = ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
APERTUS_ROLES = [
    f"<|{role}_{part}|>" for role in ("system", "developer", "user", "assistant") for part in ("start", "end")
]
COMMAND_ROLES = [
    f"<|{role}_TOKEN|>" for role in ("START_OF_TURN", "END_OF_TURN", "CHATBOT", "USER", "SYSTEM", "DEVELOPER", "TOOL")
]
ALTERNATE = (
    "{% for m in rest if m.role in ('user', 'assistant') and not m.tool_calls %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
REST = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}"
)

FAMILIES = {
    # Adds a system message of its own if the chat has none.
    "smollm2": Family(
        "{% for m in messages %}{% if loop.first and messages[0].role != 'system' %}<|im_start|>system\nHelp.<|im_end|>\n"
        "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        CHATML_TOKENS,
        "<|im_end|>",
    ),
    # Tools in the system message, tool calls as JSON between tags that are tokens but not special.
    "qwen2.5": Family(
        "{% if tools %}<|im_start|>system\n{{ (messages[0].content if messages[0].role == 'system' else 'Help.') + '\n' }}"
        "{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}<|im_end|>\n"
        "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' or m.role == 'system' and not loop.first %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant' }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n@CALL\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        CHATML_TOKENS,
        "<|im_end|>",
    ),
    # An empty thinking block before the last answer; thinking of earlier turns is dropped.
    "qwen3": Family(
        "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}<|im_end|>\n{% endif %}"
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role in ('user', 'system') %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{% set content = m.content or '' %}{% set thought = m.reasoning_content or '' %}"
        "{% if '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or thought) %}"
        "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}{{ content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n@CALL\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}",
        CHATML_TOKENS,
        "<|im_end|>",
    ),
    # `{% generation %}` blocks around the header and around the newline after the end; the date in the system message.
    "smollm3": Family(
        "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %B %Y') + '\n' }}"
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}{{ '<|im_end|>\n' }}"
        "{% for m in messages %}{% if m.role in ('user', 'tool') %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + "
        "(m.content or '').lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}",
        CHATML_TOKENS,
        "<|im_end|>",
    ),
    # The answer ends in a token that is not EOS; the date is in the system message.
    "llama3": Family(
        "{{ bos_token }}{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
        "{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}{% set messages = messages[1:] %}"
        "{% else %}{% set system = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' + system + '<|eot_id|>' }}"
        "{% for m in messages %}{% if m.tool_calls %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% set c = m.tool_calls[0] %}{{ '@CALL<|eot_id|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|start_header_id|>ipython<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
        "{% else %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        LLAMA3_TOKENS,
        "<|end_of_text|>",
        bos="<|begin_of_text|>",
        stops=("<|eot_id|>",),
    ),
    # The system message inside the first question; sentencepiece with a dummy prefix; roles must alternate.
    "llama2": Family(
        REST + ALTERNATE + "{% for m in rest %}{% if m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + ('<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is defined else '')"
        " + m.content.strip() + ' [/INST]' }}{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        bos="<s>",
        kind="legacy",
    ),
    # No system message at all; no space before an answer.
    "mistral-v1": Family(
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        bos="<s>",
        kind="legacy",
    ),
    # The system message before the last message of the chat, if that is a question; it disappears after an answer.
    "mistral-v3": Family(
        REST + ALTERNATE + "{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ '@CALL' }}{% endfor %}"
        "{{ ']' + eos_token }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
        "{% else %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}",
        MISTRAL_TOKENS,
        "</s>",
        bos="<s>",
        kind="sentencepiece",
    ),
    # The same on a byte-level tokenizer, without spaces: the system message moves to the last question.
    "mistral-tekken": Family(
        REST + ALTERNATE + "{% set ns = namespace(last=-1) %}{% for m in rest %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ '[INST]' + (system + '\n\n' if loop.index0 == ns.last and system is defined else '') + m.content + '[/INST]' }}"
        "{% elif m.tool_calls %}{{ '[TOOL_CALLS][' }}{% for c in m.tool_calls %}{{ '@CALL' }}{% endfor %}"
        "{{ ']' + eos_token }}{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        MISTRAL_TOKENS,
        "</s>",
        bos="<s>",
    ),
    # EOS after the whole chat, unless a generation prompt is requested; an answer ends with another token.
    "phi3": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
        "<|endoftext|>",
        bos="<s>",
        adds_bos=False,
        kind="sentencepiece",
        stops=("<|end|>",),
    ),
    # An empty system message is left out; otherwise like Phi-3.
    "phi3.5": Family(
        "{% for m in messages %}{% if m.role == 'system' and m.content %}{{ '<|system|>\n' + m.content + '<|end|>\n' }}"
        "{% elif m.role == 'user' %}{{ '<|user|>\n' + m.content + '<|end|>\n' }}"
        "{% elif m.role == 'assistant' %}{{ '<|assistant|>\n' + m.content + '<|end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        kind="legacy",
        rstrip=True,
        stops=("<|end|>",),
    ),
    # Another name for the assistant, no system message, an end that is not EOS, and a newline after it.
    "gemma": Family(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        bos="<bos>",
        stops=("<end_of_turn>",),
    ),
    # The system message inside the first question.
    "gemma3": Family(
        "{{ bos_token }}" + REST + "{% for m in rest %}"
        "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
        "(system + '\n\n' if loop.first and system is defined else '') + m.content | trim + '<end_of_turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        bos="<bos>",
        stops=("<end_of_turn>",),
    ),
    # The prompt opens a thinking block; answers in a chat lose their thinking and the block.
    "deepseek-r1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        "{% elif m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'tool' %}{{ '<|tool|>' + m.content }}"
        "{% elif m.tool_calls %}{{ '<|Assistant|><|call|>' }}{% for c in m.tool_calls %}{{ '@CALL' }}{% endfor %}"
        "{{ '<|endcall|>' + eos_token }}"
        "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ("<|begin|>", "<|sentence_end|>", "<|User|>", "<|Assistant|>", "<|call|>", "<|endcall|>", "<|tool|>"),
        "<|sentence_end|>",
        bos="<|begin|>",
    ),
    # Headers as plain text, EOS after an answer.
    "deepseek-v2": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\n\n' }}"
        "{% elif m.role == 'assistant' %}{{ 'Assistant: ' + m.content + eos_token }}"
        "{% elif m.role == 'system' %}{{ m.content + '\n\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}",
        ("<|begin|>", "<|sentence_end|>"),
        "<|sentence_end|>",
        bos="<|begin|>",
    ),
    # Newlines before and after the end.
    "zephyr": Family(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ("<s>", "</s>"),
        "</s>",
        bos="<s>",
        kind="legacy",
    ),
    # No special token in the middle of the chat, EOS after the last answer only.
    "olmo": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<|assistant|>\n' + m.content + (eos_token if loop.last else '\n') }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|endoftext|>",),
        "<|endoftext|>",
        bos="<|endoftext|>",
        adds_bos=False,
    ),
    # Nothing but text: no special token at all after an answer.
    "vicuna": Family(
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + '\n' }}"
        "{% else %}{{ m.role | upper + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
        ("<s>", "</s>"),
        "</s>",
        bos="<s>",
        kind="sentencepiece",
    ),
    # Tokens for roles, and an end that is not EOS.
    "command-r": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|START|><|CHATBOT|>' + m.content | trim + "
        "'<|END|>' }}{% else %}{{ '<|START|><|' + m.role | upper + '|>' + m.content + '<|END|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|START|><|CHATBOT|>' }}{% endif %}",
        ("<BOS>", "<EOS>", "<|START|>", "<|END|>", "<|CHATBOT|>", "<|USER|>", "<|SYSTEM|>", "<|TOOL|>"),
        "<EOS>",
        bos="<BOS>",
        stops=("<|END|>",),
    ),
    # Channels within a turn; the last answer ends with another token than earlier answers.
    "gpt-oss": Family(
        "{{ '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{% set last = loop.last and not add_generation_prompt %}"
        "{% if m.tool_calls %}{% set c = m.tool_calls[0] %}{% if m.content or m.reasoning_content %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.reasoning_content) + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant to=' + c.function.name + "
        "'<|channel|>commentary<|message|>' + c.function.arguments | tojson + '<|call|>' }}{% else %}"
        "{% if m.reasoning_content and last %}{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.reasoning_content + "
        "'<|end|>' }}{% endif %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + "
        "('<|return|>' if last else '<|end|>') }}{% endif %}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
        "<|return|>",
        stops=("<|call|>",),
    ),
    # Nothing after an answer: it ends with the token that begins the next turn, and after a call with another token.
    "glm-4.6": Family(
        "[gMASK]<sop>{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|assistant|>\n<think>' + "
        "((m.reasoning_content or '') if loop.index0 > ns.last else '') + '</think>' }}"
        "{% if m.content %}{{ '\n' + m.content.strip() }}{% endif %}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>' + c.function.name + '\n' + (c.function.arguments | tojson) + "
        "'\n</tool_call>' }}{% endfor %}{% elif m.role == 'tool' %}{{ '<|observation|>\n' + m.content }}"
        "{% else %}{{ '<|' + m.role + '|>\n' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        GLM_TOKENS,
        "<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    # The same, with a block that the prompt opens, and only a closing tag before an answer in a chat.
    "glm-4.7": Family(
        "[gMASK]<sop>{% for m in messages %}{% if m.role == 'assistant' %}" + THOUGHT + "{{ '<|assistant|>' + "
        "('<think>' + thought if thought and loop.last else '') + '</think>' + content }}"
        "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + (c.function.arguments | tojson) + '</tool_call>' }}"
        "{% endfor %}{% elif m.role == 'tool' %}{{ '<|observation|>' + m.content }}"
        "{% else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|><think>{% endif %}",
        GLM_TOKENS,
        "<|endoftext|>",
        stops=("<|user|>", "<|observation|>"),
    ),
    # A single assistant block from a call over its result to the answer, although the prompt opens a new block.
    "apertus": Family(
        "{{ bos_token }}{% set ns = namespace(open=false) %}"
        "{% for m in messages %}{% if m.role in ('user', 'system', 'developer') %}"
        "{{ '<|assistant_end|>' if ns.open else '' }}{% set ns.open = false %}"
        "{{ '<|' + m.role + '_start|>' + m.content + '<|' + m.role + '_end|>' }}"
        "{% elif m.role == 'tool' %}{{ '[' + m.content + ']' }}"
        "{% else %}{{ '' if ns.open else '<|assistant_start|>' }}{% set ns.open = true %}{{ m.content or '' }}"
        "{% if m.tool_calls %}{{ '<|tools_prefix|>[' }}{% for c in m.tool_calls %}"
        "{{ '{' + (c.function.name | tojson) + ': ' + (c.function.arguments | tojson) + '}' }}{% endfor %}"
        "{{ ']<|tools_suffix|>' }}{% else %}{{ '<|assistant_end|>' }}{% set ns.open = false %}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant_start|>{% endif %}",
        ("<s>", *APERTUS_ROLES, "<|tools_prefix|>", "<|tools_suffix|>"),
        "<|assistant_end|>",
        bos="<s>",
        adds_bos=False,
        stops=("<|tools_suffix|>",),
    ),
    # A prompt that opens a thinking block. The last answer of a chat has a block even if it is empty, earlier answers do not.
    "qwen3.5": Family(
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + THOUGHT
        + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last %}"
        "{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n@CALL\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + "
        "('<think>\n\n</think>\n\n' if enable_thinking is defined and enable_thinking is false else '<think>\n') }}{% endif %}",
        CHATML_TOKENS,
        "<|im_end|>",
    ),
    # The prompt opens a block; thinking only if the data has it; other marks.
    "minimax-m2": Family(
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        + THOUGHT
        + "{{ ']~b]ai\n' + ('<think>\n' + thought + '\n</think>\n\n' if thought else '') + content }}"
        "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n@CALL\n</tool_call>' }}{% endfor %}{{ '[e~[\n' }}"
        "{% else %}{{ ']~b]' + m.role + '\n' + m.content + '[e~[\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ ']~b]ai\n<think>\n' }}{% endif %}",
        ("]~b]", "[e~["),
        "[e~[",
    ),
    # Two tokens at the end of an answer, the second of which ends generation.
    "command-r7b": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' + "
        "'<|START_RESPONSE|>' + (m.content or '') + '<|END_RESPONSE|><|END_OF_TURN_TOKEN|>' }}"
        "{% else %}{{ '<|START_OF_TURN_TOKEN|><|' + m.role | upper + '_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        ("<BOS_TOKEN>", *COMMAND_ROLES, "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|END_OF_TURN_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    # Role tokens that are not special; a block that the prompt opens and that an answer in a chat only closes.
    "deepseek-v3.1": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% elif m.role == 'system' %}{{ m.content }}{% elif m.role == 'tool' %}{{ '<｜tool｜>' + m.content }}"
        "{% elif m.tool_calls %}{{ '<｜Assistant｜></think>' + (m.content or '') + '<｜call｜>' }}{% for c in m.tool_calls %}{{ '@CALL' }}{% endfor %}{{ eos_token }}"
        "{% else %}{{ '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>' }}{% endif %}",
        ("<｜begin｜>", "<｜end｜>"),
        "<｜end｜>",
        bos="<｜begin｜>",
        added=("<｜User｜>", "<｜Assistant｜>", "<｜tool｜>", "<｜call｜>"),
    ),
    # Our template for a tokenizer without any.
    "plain": Family("", ("<s>", "</s>"), "</s>", bos="<s>"),
}


# The text splits of GPT-4, Llama 3 and Qwen, and line ends that are single tokens in their vocabularies.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LINES = ["\n\n", ">\n", ">\n\n", ":\n\n", "}\n", ".\n", " \n"] * 200


@functools.cache
def trained(kind: str) -> str:
    """Return a small BPE of SENTENCES as JSON, without special tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=kind != "byte", unk_token=None if kind == "byte" else "<unk>"))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if kind == "byte":
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        alphabet = [chr(i) for i in range(32, 127)] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[] if kind == "byte" else ["<unk>", *(f"<0x{i:02X}>" for i in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*SENTENCES, *LINES], trainer)
    if kind == "sentencepiece":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if kind == "legacy":  # as in Llama 2's tokenizer.json: no pre-tokenizer, the normalizer writes the prefix
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = None
    if kind != "byte":
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    return tokenizer.to_str()


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a family with its template."""
    family = FAMILIES[name]
    tokenizer = Tokenizer.from_str(trained(family.kind))
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False, rstrip=family.rstrip) for text in family.special]
    )
    tags = [f"<{slash}{tag}>" for tag in ("think", "tool_call", "tool_response") for slash in ("", "/")]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*tags, *family.added)])
    if family.bos and family.adds_bos:
        start = (family.bos, tokenizer.token_to_id(family.bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{start[0]} $A", None, [start])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=family.eos, bos_token=family.bos, clean_up_tokenization_spaces=False
    )
    fast.chat_template = family.template.replace("@CALL", CALL) or None
    return fast
