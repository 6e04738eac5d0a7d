"""What the judge is asked, and how a verdict is read from its reply."""

import hashlib
import json
import re
from pathlib import Path

from common import terminal
from common.files import UsageError, read_json
from data import prompts
from data.chats import NEXT_SPEAKER, remove_thoughts
from data.scenes import ENVIRONMENT
from evals.metrics import METRICS
from evals.shapes import check

# what a template may name in braces
FIELDS = ["book", "plot_summary", "scenario", "character_profiles", "major_characters", "fence"]
FIELDS += ["original_conversation", "simulated_conversation", "additional_instructions"]
FIELDS += ["dimension_name", "dimension_brief", "dimension_criteria"]
RUBRIC = {"template": str, "system?": str, "dimensions": dict, "severity": [int]}
FLAW = {"instance": str, "type": str, "severity": int}
# the opening brace of a JSON object; the group matches where the object is the value of a key
OPENING = re.compile(r'("\s*:\s*)?\{')
# a comma before a closing bracket, or, as the group, a whole string, whose commas are kept
TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])', re.DOTALL)


def script_line(name, text, named=False, names=True):
    """`Name: text` with thoughts removed, but not from the Environment. named: the text names its speaker."""
    shown = text if name == ENVIRONMENT else remove_thoughts(text)
    if not names:
        return shown.replace(f"{name}:", "", 1).strip() if named else shown
    return shown if named else f"{name}: {shown}"


def scripts(scene, messages, names=True):
    """(original, simulated): the text of each conversation, messages separated by a blank line."""
    original = [script_line(turn["character"], turn["message"], names=names) for turn in scene.dialogues]
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    simulated = [script_line(m["role"], m["content"], m.get("named", False), names) for m in spoken]
    return "\n\n".join(original), "\n\n".join(simulated)


def digest(*values):
    """16 hex digits that identify JSON values, such as a performance or a rubric."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_rubric(path=None):
    """Our rubric, or that of a JSON file; `name` is added, which identifies it.

    `template` and optionally `system`: texts with FIELDS in braces. `dimensions`: {name: {brief, criteria}}.
    `severity`: the smallest and the largest one.
    """
    rubric = read_json(path) if path else prompts.RUBRIC
    try:
        _check_rubric(rubric)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from None
    if "{fence}" not in rubric["template"]:
        terminal.note(f"{path}: no {{fence}} around the played scene: its words may pose as instructions")
    return {**rubric, "name": f"{Path(path).stem if path else 'coser'}-{digest(rubric)[:8]}"}


def _check_rubric(rubric):
    check(rubric, RUBRIC, "rubric")
    used = re.findall(r"\{([a-z_]+)\}", f"{rubric.get('system', '')}\n{rubric['template']}")
    if unknown := [field for field in used if field not in FIELDS]:
        raise ValueError(f"the template has no field {{{unknown[0]}}}; choose from {', '.join(FIELDS)}")
    if "{simulated_conversation}" not in rubric["template"]:
        raise ValueError("the template must contain {simulated_conversation}")
    if not rubric["dimensions"]:
        raise ValueError("`dimensions` is empty; it must be {name: {brief, criteria}}")
    for name, dimension in rubric["dimensions"].items():
        check(dimension, {"brief": str, "criteria": str}, f"dimensions.{name}")
        if name in ("Average", *METRICS):
            raise ValueError(f"a dimension cannot be called {name}, which is a row of every table; rename it")
    if len(rubric["severity"]) != 2 or not 0 <= rubric["severity"][0] <= rubric["severity"][1]:
        raise ValueError("`severity` must be the smallest and the largest, such as [1, 5], from 0 up")


def judge_messages(scene, messages, dimension, rubric=prompts.RUBRIC, settings=None):
    """The conversation that asks the judge about one dimension.

    The fence around each script depends on both texts, so nothing said in the scene can close it.
    """
    original, simulated = scripts(scene, messages)
    profiles = "\n\n".join(
        f"{name}: {text}" for name, text in scene.profiles.items() if name in scene.speaking_characters
    )
    given = (settings or {}).get("continue_from")
    fields = dict(
        book=scene.book,
        plot_summary=scene.plot_summary or "(not given)",
        scenario=scene.scenario or "(not given)",
        character_profiles=profiles or "(not given)",
        major_characters=", ".join(scene.major_characters) or "(none)",
        fence="=====" + digest(original, simulated),
        original_conversation=original,
        simulated_conversation=simulated,
        dimension_name=dimension,
        dimension_brief=rubric["dimensions"][dimension]["brief"],
        dimension_criteria=rubric["dimensions"][dimension]["criteria"],
        additional_instructions=prompts.CONTINUED.format(k=given) if given else "",
    )
    roles = {"system": rubric.get("system"), "user": rubric["template"]}
    return [{"role": role, "content": prompts.fill(text, fields)} for role, text in roles.items() if text]


def flaw_schema(rubric):
    """The JSON schema of a verdict, for constrained decoding."""
    (low, high), text = rubric["severity"], {"type": "string"}
    flaw = {"instance": text, "type": text, "severity": {"type": "integer", "minimum": low, "maximum": high}}
    item = {"type": "object", "properties": flaw, "required": list(flaw), "additionalProperties": False}
    flaws = {"flaws": {"type": "array", "items": item, "maxItems": 10}}
    return {"type": "object", "properties": flaws, "required": ["flaws"], "additionalProperties": False}


def parse_flaws(text, dimension=None, severity=(1, 5)):
    """The flaws of the last verdict in a judge's reply; ValueError says why there is none.

    A verdict is a whole JSON object with a list `flaws`, which may stand under the dimension's name. Words
    and braces around it and commas before a closing bracket are ignored; no flaw is left out or repaired.
    """
    verdicts, problem = _verdicts(text, dimension)
    without_commas = TRAILING_COMMA.sub(lambda part: part[1] or "", text[max(text.find("{"), 0) :])
    verdicts = max(verdicts, _verdicts(without_commas, dimension)[0], key=len)
    if not verdicts:
        raise ValueError(problem)
    flaws, (low, high) = verdicts[-1], severity
    check(flaws, [FLAW], "flaws")
    if wrong := [flaw["severity"] for flaw in flaws if not low <= flaw["severity"] <= high]:
        raise ValueError(f"severity {str(wrong[0])[:20]} is not an integer from {low} to {high}")
    return [
        {"instance": writable(flaw["instance"]), "type": writable(flaw["type"]), "severity": flaw["severity"]}
        for flaw in flaws
    ]


def _verdicts(text, dimension):
    """(the `flaws` of each verdict in a text, why there is none if there is none)."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    verdicts, problem, end = [], "no JSON object in the reply", 0
    while opening := OPENING.search(text, end):
        end = opening.end()
        if opening[1]:  # inside an object that is broken: perhaps another dimension's verdict
            continue
        try:
            found, end = decoder.raw_decode(text, end - 1)
        except ValueError as error:
            problem = f"no whole JSON object in the reply ({error})"
            continue
        if "flaws" not in found and isinstance(found.get(dimension), dict):
            found = found[dimension]
        if isinstance(found.get("flaws"), list):
            verdicts.append(found["flaws"])
        elif problem.startswith("no JSON"):
            problem = "no list of flaws in the reply"
    return verdicts, problem


def _unique_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return dict(pairs)


def writable(text):
    """The text with lone surrogates, which UTF-8 cannot encode, replaced by question marks."""
    return text.encode("utf-8", errors="replace").decode()
