"""What the judge is asked, and what of its reply is a verdict."""

import hashlib
import json
import re
from pathlib import Path

from common import terminal
from common.files import UsageError, read_json
from data import prompts
from data.chats import NEXT_SPEAKER, remove_thoughts
from data.scenes import ENVIRONMENT

FIELDS = (
    "book",
    "plot_summary",
    "scenario",
    "character_profiles",
    "major_characters",
    "original_conversation",
    "fence",
)

FIELDS += (
    "simulated_conversation",
    "dimension_name",
    "dimension_brief",
    "dimension_criteria",
    "additional_instructions",
)


def script_line(name, text, named=False, names=True):
    """`Name: text`, thoughts removed but for the Environment, whose text stays as it is. named: the text says who speaks."""
    shown = text if name == ENVIRONMENT else remove_thoughts(text)
    if not names:
        return shown.replace(f"{name}:", "", 1).strip() if named else shown
    return shown if named else f"{name}: {shown}"


def scripts(scene, messages, names=True):
    """(original, simulated) as one text each, a blank line between messages."""
    original = [script_line(turn["character"], turn["message"], names=names) for turn in scene.dialogues]
    spoken = [message for message in messages if message["role"] != NEXT_SPEAKER]
    simulated = [script_line(m["role"], m["content"], m.get("named", False), names) for m in spoken]
    return "\n\n".join(original), "\n\n".join(simulated)


def digest(*values):
    """What tells a performance, or a rubric, from every other."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def load_rubric(path=None):
    """Ours, or that of a JSON file: `template` and, if wanted, `system`, with FIELDS in braces; `dimensions`, {name: {brief,
    criteria}}; `severity`, its least and greatest value. Adds `name`, which tells it from every other rubric.
    """
    rubric = read_json(path) if path else prompts.RUBRIC
    texts = [rubric.get("system", ""), rubric.get("template")]
    dimensions, bounds = rubric.get("dimensions"), rubric.get("severity")
    if not all(isinstance(text, str) for text in texts):
        raise UsageError(f"{path}: `template` (and `system`, where given) has to be a text")
    unknown = [field for field in re.findall(r"\{([a-z_]+)\}", "\n".join(texts)) if field not in FIELDS]
    if unknown or "{simulated_conversation}" not in texts[1]:
        what = f"knows no field {{{unknown[0]}}}" if unknown else "lacks {simulated_conversation}"
        raise UsageError(f"{path}: the template {what}; there are {', '.join(FIELDS)}")
    good = (
        isinstance(dimensions, dict) and dimensions and all(isinstance(d, dict) for d in dimensions.values())
    )
    if not good or not all(
        isinstance(d.get(key), str) for d in dimensions.values() for key in ("brief", "criteria")
    ):
        raise UsageError(f"{path}: `dimensions` has to hold, for each name, a `brief` and `criteria`")
    if (
        not isinstance(bounds, list)
        or [type(b) for b in bounds] != [int, int]
        or not 0 <= bounds[0] <= bounds[1]
    ):
        raise UsageError(f"{path}: `severity` has to be the least and the greatest, such as [1, 5]")
    if "{fence}" not in texts[1]:
        terminal.note(
            f"{path}: without {{fence}} round the played scene, what characters say may pose as instructions"
        )
    return {**rubric, "name": f"{Path(path).stem if path else 'coser'}-{digest(rubric)[:8]}"}


def judge_messages(scene, messages, dimension, rubric=prompts.RUBRIC, settings=None):
    """What the judge is asked about one dimension. The fence depends on both texts, so no character can close it."""
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
    """JSON schema of a verdict, to which a local judge is held."""
    low, high = rubric["severity"]
    text = {"type": "string"}
    flaw = {"instance": text, "type": text, "severity": {"type": "integer", "minimum": low, "maximum": high}}
    item = {"type": "object", "properties": flaw, "required": list(flaw), "additionalProperties": False}
    flaws = {"flaws": {"type": "array", "items": item, "maxItems": 10}}
    return {"type": "object", "properties": flaws, "required": ["flaws"], "additionalProperties": False}


def parse_flaws(text, dimension=None, severity=(1, 5)):
    """The flaws of a judge's reply; ValueError says what is wrong with it. An invalid severity is never just left out.

    What is mended: words and code fences around the JSON, commas before a closing bracket. The flaws may stand under the name
    of the dimension.
    """
    first, last = text.find("{"), text.rfind("}")
    if first < 0 or last < first:
        raise ValueError("no JSON object in the reply")
    mended = re.sub(
        r'("(?:[^"\\]|\\.)*")|,(?=\s*[\]}])',
        lambda part: part[1] or "",
        text[first : last + 1],
        flags=re.DOTALL,
    )
    found = json.loads(mended, object_pairs_hook=_unique)
    if "flaws" not in found and isinstance(found.get(dimension), dict):
        found = found[dimension]
    if not isinstance(found.get("flaws"), list):
        raise ValueError("no list of flaws in the reply")
    for flaw in found["flaws"]:
        if not isinstance(flaw, dict) or not all(
            isinstance(flaw.get(key), str) for key in ("instance", "type")
        ):
            raise ValueError(f"not a flaw with instance, type and severity: {str(flaw)[:80]}")
        value = flaw.get("severity")
        if type(value) is not int or not severity[0] <= value <= severity[1]:
            raise ValueError(
                f"severity {str(value)[:20]!r} is not a whole number from {severity[0]} to {severity[1]}"
            )
    return [{key: _whole(flaw[key]) for key in ("instance", "type", "severity")} for flaw in found["flaws"]]


def _unique(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice in an object of the reply")
    return dict(pairs)


def _whole(value):
    """Half of a surrogate pair is no character and cannot be written: it becomes a question mark."""
    return value.encode("utf-8", errors="replace").decode() if isinstance(value, str) else value
