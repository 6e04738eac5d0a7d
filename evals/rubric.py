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

# what a template may name in braces
FIELDS = """book plot_summary scenario character_profiles major_characters original_conversation fence
simulated_conversation dimension_name dimension_brief dimension_criteria additional_instructions""".split()


def script_line(name, text, named=False, names=True):
    """`Name: text` without thoughts; the Environment's text is kept as it is. named: the text itself names the speaker."""
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

    Fields: `template` and optionally `system`, with FIELDS in braces; `dimensions`: {name: {brief, criteria}};
    `severity`: the smallest and the largest one allowed.
    """
    rubric = read_json(path) if path else prompts.RUBRIC
    if problem := _problem(rubric):
        raise UsageError(f"{path}: {problem}")
    if "{fence}" not in rubric["template"]:
        terminal.note(
            f"{path}: no {{fence}} around the played scene: characters' words may pose as instructions"
        )
    return {**rubric, "name": f"{Path(path).stem if path else 'coser'}-{digest(rubric)[:8]}"}


def _problem(rubric):
    """What is wrong with a rubric, or None."""
    texts = [rubric.get("system", ""), rubric.get("template")]
    if not all(isinstance(text, str) for text in texts):
        return "`template` (and `system`, if given) must be a string"
    unknown = [field for field in re.findall(r"\{([a-z_]+)\}", "\n".join(texts)) if field not in FIELDS]
    if unknown:
        return f"the template has no field {{{unknown[0]}}}; choose from {', '.join(FIELDS)}"
    if "{simulated_conversation}" not in texts[1]:
        return "the template must contain {simulated_conversation}"
    dimensions = rubric.get("dimensions")
    if not isinstance(dimensions, dict) or not dimensions:
        return "`dimensions` must be an object: {name: {brief, criteria}}"
    for name, dimension in dimensions.items():
        if name in ("Average", *METRICS):
            return f"a dimension cannot be called {name!r}, which is a row of the tables; choose another name"
        if not isinstance(dimension, dict) or not all(
            isinstance(dimension.get(key), str) for key in ("brief", "criteria")
        ):
            return f"`dimensions`: {name!r} must have a `brief` and `criteria`, both strings"
    bounds = rubric.get("severity")
    if not isinstance(bounds, list) or [type(bound) for bound in bounds] != [int, int]:
        return "`severity` must be two integers, the smallest and the largest, such as [1, 5]"
    return (
        None if 0 <= bounds[0] <= bounds[1] else f"`severity`: {bounds} is not an increasing range from 0 up"
    )


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
    low, high = rubric["severity"]
    text = {"type": "string"}
    flaw = {"instance": text, "type": text, "severity": {"type": "integer", "minimum": low, "maximum": high}}
    item = {"type": "object", "properties": flaw, "required": list(flaw), "additionalProperties": False}
    flaws = {"flaws": {"type": "array", "items": item, "maxItems": 10}}
    return {"type": "object", "properties": flaws, "required": ["flaws"], "additionalProperties": False}


def parse_flaws(text, dimension=None, severity=(1, 5)):
    """The flaws of the last verdict in a judge's reply; ValueError says why there is none.

    A verdict is a whole JSON object with a list `flaws`, which may stand under the dimension's name. Words and braces
    around it are skipped and commas before a closing bracket forgiven; a flaw is never skipped or repaired.
    """
    verdict, problem = _last_verdict(text, dimension)
    if verdict is None:
        verdict, _ = _last_verdict(_without_trailing_commas(text), dimension)
    if verdict is None:
        raise ValueError(problem)
    flaws = []
    for flaw in verdict:
        if not isinstance(flaw, dict) or not all(isinstance(flaw.get(k), str) for k in ("instance", "type")):
            raise ValueError(f"not a flaw with instance, type and severity: {str(flaw)[:80]}")
        value = flaw.get("severity")
        if type(value) is not int or not severity[0] <= value <= severity[1]:
            raise ValueError(
                f"severity {str(value)[:20]!r} is not an integer from {severity[0]} to {severity[1]}"
            )
        flaws.append(
            {"instance": writable(flaw["instance"]), "type": writable(flaw["type"]), "severity": value}
        )
    return flaws


def _last_verdict(text, dimension):
    """(the `flaws` of the last verdict in a text or None, why there is none)."""
    decoder, opening_brace = json.JSONDecoder(object_pairs_hook=_unique_keys), re.compile(r'("\s*:\s*)?\{')
    flaws, problem, end = None, "no JSON object in the reply", 0
    while opening := opening_brace.search(text, end):
        end = opening.end()
        if opening[1]:  # a value inside an object that is itself broken: not a whole reply
            continue
        try:
            found, end = decoder.raw_decode(text, end - 1)
        except ValueError as error:
            problem = f"no whole JSON object in the reply ({error})"
            continue
        if "flaws" not in found and isinstance(found.get(dimension), dict):
            found = found[dimension]
        if isinstance(found.get("flaws"), list):
            flaws = found["flaws"]
        elif problem.startswith("no JSON"):
            problem = "no list of flaws in the reply"
    return flaws, problem


def _without_trailing_commas(text):
    """The text from its first brace on without commas before a closing bracket; JSON strings stay as they are."""
    start = max(text.find("{"), 0)
    pattern = r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])'
    return re.sub(pattern, lambda part: part[1] or "", text[start:], flags=re.DOTALL)


def _unique_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return dict(pairs)


def writable(text):
    """The text with lone surrogates, which UTF-8 cannot encode, replaced by question marks."""
    return text.encode("utf-8", errors="replace").decode()
