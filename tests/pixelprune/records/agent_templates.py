"""Chat templates that write tools, calls and reasoning as the published ones of Qwen3-VL and Qwen3.5 do."""

_COMMON = """
{%- macro show(content) -%}
{%- if content is string -%}{{- content -}}
{%- else -%}{%- for part in content -%}
{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}{{- part.text -}}{%- endif -%}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if messages[0].role == 'system' -%}{{- show(messages[0].content) + '\\n\\n' -}}{%- endif -%}
{{- '# Tools\\n<tools>' -}}{%- for tool in tools -%}{{- '\\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\\n</tools><|im_end|>\\n' -}}
{%- elif messages[0].role == 'system' -%}
{{- '<|im_start|>system\\n' + show(messages[0].content) + '<|im_end|>\\n' -}}
{%- endif -%}
{%- set seen = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set content = show(m.content) -%}
{%- if m.role == 'user' -%}{{- '<|im_start|>user\\n' + content + '<|im_end|>\\n' -}}
{%- elif m.role == 'tool' -%}
{%- if loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif m.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' -}}ANSWER
{%- for call in m.tool_calls or [] -%}
{%- set call = call.function or call -%}
{{- '\\n' if content or not loop.first else '' -}}CALL
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}PROMPT{%- endif -%}"""

_JSON_CALL = """
{{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' + (call.arguments | tojson) + '}\\n</tool_call>' -}}"""
_TAGGED_CALL = """
{{- '<tool_call>\\n<function=' + call.name + '>\\n' -}}
{%- for name, value in call.arguments | items -%}
{{- '<parameter=' + name + '>\\n' + (value | string) + '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>' -}}"""
_SPLIT = """
{%- set thought = m.reasoning_content if m.reasoning_content is string else '' -%}
{%- if m.reasoning_content is not string and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}"""
_THOUGHT = "{{- '<think>\\n' + thought | trim + '\\n</think>\\n\\n' -}}"


def _template(answer, call, prompt):
    return _COMMON.replace("ANSWER", answer).replace("CALL", call).replace("PROMPT", prompt)


_THINKING = _SPLIT + (
    "{%- if loop.index0 > seen.last and (loop.last or thought) -%}" + _THOUGHT + "{%- endif -%}{{- content -}}"
)
_THINKING_3_5 = _SPLIT + "{%- if loop.index0 > seen.last -%}" + _THOUGHT + "{%- endif -%}{{- content -}}"
_CLOSED, _OPEN = "{{- '<think>\\n\\n</think>\\n\\n' -}}", "{{- '<think>\\n' -}}"
TEMPLATES = {
    "instruct": _template("{{- content -}}", _JSON_CALL, ""),
    "thinking": _template(_THINKING, _JSON_CALL, _OPEN),
    "qwen3_5 think": _template(
        _THINKING_3_5,
        _TAGGED_CALL,
        "{%- if enable_thinking is false -%}" + _CLOSED + "{%- else -%}" + _OPEN + "{%- endif -%}"
    ),
    "qwen3_5 nothink": _template(
        _THINKING_3_5,
        _TAGGED_CALL,
        "{%- if enable_thinking is true -%}" + _OPEN + "{%- else -%}" + _CLOSED + "{%- endif -%}"
    ),
}  # fmt: skip
"""By name: Qwen3-VL-Instruct, Qwen3-VL-Thinking, and Qwen3.5 with either default."""
