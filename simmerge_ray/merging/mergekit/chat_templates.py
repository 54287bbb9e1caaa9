"""Chat templates by name, written from the formats that the models were trained on.

They render what mergekit's of the same names do, but for two whose rendering there is not the models' own: it adds a
line break after every turn of `llama3`, and indents the turns of `exaone`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from simmerge_ray.base.storage import file_names, read_json_object, read_text
from simmerge_ray.checkpoints.references import CheckpointRef
from simmerge_ray.checkpoints.tokenizers import CHAT_TEMPLATE, TOKENIZER_CONFIG

_CHATML = """\
{%- for turn in messages %}
{{- '<|im_start|>' ~ turn.role ~ '\\n' ~ turn.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""

_LLAMA3 = """\
{%- for turn in messages %}
{{- (bos_token if loop.first else '') ~ '<|start_header_id|>' ~ turn.role ~ '<|end_header_id|>\\n\\n' }}
{{- turn.content | trim ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

_MISTRAL = """\
{%- set has_system = messages[0].role == 'system' %}
{%- set turns = messages[1:] if has_system else messages %}
{{- bos_token }}
{%- for turn in turns %}
{%- if turn.role != ('assistant' if loop.index0 % 2 else 'user') %}
{{- raise_exception('after a system message, user and assistant must take turns, the user first') }}
{%- endif %}
{%- if turn.role == 'assistant' %}{{- ' ' ~ turn.content ~ eos_token }}
{%- elif loop.first and has_system %}{{- ' [INST] ' ~ messages[0].content ~ '\\n\\n' ~ turn.content ~ ' [/INST]' }}
{%- else %}{{- ' [INST] ' ~ turn.content ~ ' [/INST]' }}
{%- endif %}
{%- endfor %}"""

_ALPACA = """\
{%- set has_system = messages and messages[0].role == 'system' %}
{%- if has_system %}{{- messages[0].content | trim }}{% endif %}{{- '\\n\\n' }}
{%- for turn in (messages[1:] if has_system else messages) %}
{{- ('### Response:\\n' if turn.role == 'assistant' else '### Instruction:\\n') ~ turn.content | trim }}
{%- if not loop.last %}{{- '\\n\\n' }}{% endif %}
{%- if loop.last and turn.role == 'user' and add_generation_prompt %}{{- '### Response:\\n' }}{% endif %}
{%- endfor %}"""

_EXAONE = """\
{%- for turn in messages %}
{%- if loop.first and turn.role != 'system' %}{{- '[|system|][|endofturn|]\\n' }}{% endif %}
{{- '[|' ~ turn.role ~ '|]' ~ turn.content ~ ('\\n' if turn.role == 'user' else '[|endofturn|]\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[|assistant|]' }}{% endif %}"""

TEMPLATES: Mapping[str, str] = {
    "alpaca": _ALPACA,
    "chatml": _CHATML,
    "exaone": _EXAONE,
    "llama3": _LLAMA3,
    "mistral": _MISTRAL,
}


def template_of(ref: CheckpointRef) -> str | None:
    """The chat template of a checkpoint's tokenizer: its file, or the (default) one in `tokenizer_config.json`."""
    names = file_names(ref.path) or ()
    if CHAT_TEMPLATE in names:
        try:
            return read_text(ref.path / CHAT_TEMPLATE)
        except OSError as error:
            raise ref.error(f"cannot read {ref.path / CHAT_TEMPLATE}: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ref.error(f"{ref.path / CHAT_TEMPLATE} is not UTF-8 text") from None
    if TOKENIZER_CONFIG not in names:
        return None
    found = read_json_object(ref.path / TOKENIZER_CONFIG, ref.error).get("chat_template")
    if isinstance(found, list):
        found = next(
            (one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"), None
        )
    return found if isinstance(found, str) else None


def commonest_template(refs: Iterable[CheckpointRef]) -> str | None:
    """The one that most checkpoints have, of equals the first; None where none has one."""
    templates = [text.strip() for ref in refs if (text := template_of(ref))]
    return Counter(templates).most_common(1)[0][0] if templates else None
