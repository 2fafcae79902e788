"""Prompts by name: what is written around a record's own question, in evaluation and in training alike."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pixelprune.records.record import Message, Record, RecordError

__all__ = ["AS_RECORDED", "PRESETS", "Preset", "get_preset"]

QUESTION = "{question}"


@dataclass(frozen=True)
class Preset:
    """A prompt. system: a system turn in front, "" for none; template: every question's text, `{question}` within."""

    system: str = ""
    template: str = QUESTION

    def apply(self, record: Record) -> Record:
        """The record asked this way. Its answers are as they were.

        Raises RecordError (two_systems, several_texts) for a record that has a system turn beside the preset's, and for
        a question in several pieces, around which no template can be written.
        """
        messages = [self._asked(message) if message.role == "user" else message for message in record.messages]
        if self.system:
            if messages and messages[0].role == "system":
                raise RecordError("two_systems", "the record has a system prompt, and so has its prompt preset")
            messages.insert(0, Message("system", (self.system,)))
        return replace(record, messages=tuple(messages))

    def _asked(self, message: Message) -> Message:
        if self.template == QUESTION:
            return message
        texts = [part for part in message.parts if isinstance(part, str)]
        if len(texts) != 1:
            raise RecordError(
                "several_texts", f"a question in {len(texts)} pieces of text: a prompt preset is written around one"
            )
        asked = self.template.replace(QUESTION, texts[0])
        return replace(message, parts=tuple(asked if isinstance(part, str) else part for part in message.parts))


def _computer_use() -> Preset:
    """Its words are those of ScreenSpot Pro's evaluation of Qwen3-VL (models/qwen3vl.py of
    ScreenSpot-Pro-GUI-Grounding, as github.com/anaicalledsolaris/ScreenSpot-Pro-GUI-Grounding has it, commit 573b40e),
    its frame is that of Qwen3-VL's own cookbooks/computer_use.ipynb (github.com/QwenLM/Qwen3-VL, commit 96a8f59): the
    tool as JSON. The evaluation's copy of it is none: lines break within texts, and a brace is missing.
    """
    tool = {
        "type": "function",
        "function": {
            "name": "computer_use",
            "description": "Use a mouse to interact with a computer.\n* The screen's resolution is 1000x1000.\n* Make "
            "sure to click any buttons, links, icons, etc with the cursor tip in the center of the element. \n* You "
            "can only use the left_click action to interact with the computer.",
            "parameters": {
                "properties": {
                    "action": {
                        "description": "The action to perform. The available actions are:\n* `left_click`: Click the "
                        "left mouse button with coordinate (x, y).",
                        "enum": ["left_click"],
                        "type": "string",
                    },
                    "coordinate": {
                        "description": "(x, y): The x (pixels from the left edge) and y (pixels from the top edge) "
                        "coordinates to move the mouse to. Required only by `action=left_click`.",
                        "type": "array",
                    },
                },
                "required": ["action"],
                "type": "object",
            },
        },
    }
    return Preset(
        "You are a helpful assistant. The user will give you an instruction, and you MUST left click on the "
        "corresponding UI element via tool call. If you are not sure about where to click, guess a most likely one.\n\n"
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{json.dumps(tool)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )


def _computer_use_agent() -> Preset:
    """What Qwen3-VL's computer agents are told on OSWorld: the actions of a session, relative coordinates.

    Fewer actions and shorter words than the cookbook's tool (cookbooks/utils/agent_function_call.py, commit 0dcc180).
    """
    actions = {
        "key": "Performs key down presses on the arguments passed in order, then performs key releases in reverse "
        "order.",
        "type": "Type a string of text on the keyboard.",
        "mouse_move": "Move the cursor to a specified (x, y) pixel coordinate on the screen.",
        "left_click": "Click the left mouse button at a specified (x, y) pixel coordinate on the screen.",
        "scroll": "Performs a scroll of the mouse scroll wheel.",
        "wait": "Wait specified seconds for the change to happen.",
        "terminate": "Terminate the current task and report its completion status.",
    }
    properties = {
        "action": {
            "description": "\n".join(f"* `{name}`: {text}" for name, text in actions.items()),
            "enum": list(actions),
            "type": "string",
        },
        "keys": {"description": "Required only by `action=key`.", "type": "array"},
        "text": {"description": "Required only by `action=type`.", "type": "string"},
        "coordinate": {"description": "The x,y coordinates for mouse actions.", "type": "array"},
        "pixels": {"description": "The amount of scrolling.", "type": "number"},
        "time": {"description": "The seconds to wait.", "type": "number"},
        "status": {"description": "The status of the task.", "type": "string", "enum": ["success", "failure"]},
    }
    description = (
        "Use a mouse and keyboard to interact with a computer, and take screenshots.\n* The screen's resolution is "
        "1000x1000.\n* Make sure to click any buttons, links, icons, etc with the cursor tip in the center of the "
        "element."
    )
    parameters = {"properties": properties, "required": ["action"], "type": "object"}
    tool = {
        "type": "function",
        "function": {"name": "computer_use", "description": description, "parameters": parameters},
    }
    return Preset(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{json.dumps(tool)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within <tool_call></tool_call> "
        'XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n'
        "# Response format\n\nResponse format for every step:\n"
        "1) Action: a short imperative describing what to do in the UI.\n"
        "2) A single <tool_call>...</tool_call> block containing only the JSON.\n\n"
        "Rules:\n- Output exactly in the order: Action, <tool_call>.\n- Be brief: one sentence for Action.\n"
        "- Do not output anything else outside those parts.\n- If finishing, use action=terminate in the tool call."
    )


PRESETS = {
    "as_recorded": Preset(),
    # The tool prompt that the instruct models are evaluated with on ScreenSpot Pro: one tool, one action.
    "computer_use": _computer_use(),
    # The same tool with every action, as the instruct models' agents are asked over a session of screenshots.
    "computer_use_agent": _computer_use_agent(),
    "point": Preset(
        template="Where is the element for this instruction? Answer with its point as (x, y), both from 0 to 1000.\n"
        "Instruction: {question}"
    ),
    # OSWorld-G asks for things that are not there; (-1, -1) is then right.
    "point_or_refuse": Preset(
        template="Where is the element for this instruction? Answer with its point as (x, y), both from 0 to 1000, or "
        "with (-1, -1) if there is none.\nInstruction: {question}"
    ),
    # As the paper's published evaluation asks (its Qwen3VLPromptMixin, commit a870e31).
    "short_answer": Preset(template="{question}\nAnswer the question using a single word or phrase."),
    "select_option": Preset(template="Question: {question}\nPlease select the correct answer from the options above."),
    "option_letter": Preset(template="Question: {question}\nAnswer with the option letter only."),
    # lmms-eval 0.7.3's words for the same benchmarks.
    "single_word": Preset(template="{question}\nAnswer the question with a single word."),
    "option_letter_directly": Preset(
        template="{question}\nAnswer with the option's letter from the given choices directly."
    ),
    "document": Preset(
        template="{question}\nAnswer with a single word or phrase. If the answer is not in the document, answer "
        "'Not answerable'."
    ),
}
"""DocVQA, InfoVQA and ChartQA: short_answer; AI2D and MMMU: select_option; other options: option_letter; OCRBench and
olmOCRBench: as_recorded; MMLongBench-Doc: document; ScreenSpot and UI-Vision: computer_use or point; sessions:
computer_use_agent."""


AS_RECORDED = PRESETS["as_recorded"]


def get_preset(name: str, system: str = "", template: str = "") -> Preset:
    """The preset of that name, with another system prompt or template where they are given.

    Raises ValueError naming the choices if there is none, and for a template without its place for the question.
    """
    if name not in PRESETS:
        raise ValueError(f"prompt: expected one of {', '.join(PRESETS)}, got {name!r}")
    if template and template.count(QUESTION) != 1:
        raise ValueError(f"template: expected {QUESTION} once in it, got {template!r:.80}")
    return Preset(system or PRESETS[name].system, template or PRESETS[name].template)
