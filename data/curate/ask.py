"""Questions that a model answers in JSON: replies are read, repaired, asked for again and kept."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

from common.files import read_text
from data.prompts import fill
from engine.params import SamplingParams
from evals.benchmarks import Ask, ask_all
from evals.rubric import TRAILING_COMMA, digest, writable

_SECTIONS = re.compile(r"^== (\w+)\n(.*?)\n*(?=^== |\Z)", re.MULTILINE | re.DOTALL)
PROMPTS = dict(_SECTIONS.findall(read_text(Path(__file__).with_name("prompts.txt"))))
TRIES = 3  # for an answer without a problem; after them the best one is used
DECODER = json.JSONDecoder(strict=False)  # takes line ends within strings
TYPES = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
TEXT, BOOLEAN = {"type": "string"}, {"type": "boolean"}


def record(**fields):
    """The schema of an object with all of these fields."""
    return {"type": "object", "properties": fields, "required": [*fields], "additionalProperties": False}


def many(**fields):
    return {"type": "array", "items": record(**fields)}


def integer(low, high):
    return {"type": "integer", "minimum": low, "maximum": high}


def material(prompt, text, /, **fields):
    """The messages of one of PROMPTS about a text, between fences that nothing in it can close."""
    text = text.replace("\0", " ")  # which some servers refuse
    fields = {"prompt": fill(PROMPTS[prompt], fields), "fence": "=====" + digest(text), "text": text}
    return [{"role": "user", "content": fill(PROMPTS["material"], fields)}]


@dataclass(eq=False)
class Question:
    """label: unique in a run. schema: of an object with one field. accept(item, items before) makes of each
    item of the field's list (or of its one value) what is kept; ValueError if it cannot be used.

    value: the usable items of the best reply so far, None before there is one. problems: what is wrong with
    its other items. repaired: whether its JSON was. cut_off: whether it reached max_tokens. error: why the
    model gave no reply, after all retries of `llm`.
    """

    label: str
    messages: list
    schema: dict
    max_tokens: int
    accept: object = lambda item, before: item
    value: list | None = None
    problems: tuple = ("no reply",)
    error: str = ""
    tries: int = 0
    repaired: bool = False
    cut_off: bool = False

    def ask(self, seed):
        """The next call, known by its content: at temperature 0, then at 1 with what was wrong."""
        content, heat = self.messages[0]["content"], float(self.tries > 0)
        if self.tries:
            content += "\n" + fill(PROMPTS["again"], {"problems": "\n".join(self.problems[:5])})
        messages = [{"role": "user", "content": content}]
        options = {"max_tokens": self.max_tokens, "json_schema": self.schema}
        params = SamplingParams(heat, seed=seed + self.tries, **options)
        return Ask(self.label, digest(messages, vars(params)), "curator", messages, params)

    def take(self, reply):
        if reply.error is not None:
            self.error = writable(reply.error)
            return
        self.tries += 1
        value, problems, repaired = self.read(reply.text)
        # more usable items are better than fewer problems: an empty reply has none
        if self.value is None or (len(value or ()), -len(problems)) > (len(self.value), -len(self.problems)):
            self.value, self.problems, self.repaired = value, problems, repaired
            self.cut_off = reply.finish_reason == "length"

    def read(self, text):
        """(value, problems, whether the JSON was repaired) of a reply."""
        [(key, schema)] = self.schema["properties"].items()
        items, problems = [], []
        try:
            found, repaired = read_json(text, key)
            found = conform(found, {"type": "array"}, key) if "items" in schema else [found]
        except ValueError as error:
            return None, [str(error)], False
        for n, item in enumerate(found):
            try:
                items.append(self.accept(conform(item, schema.get("items", schema), f"{key} {n}"), items))
            except ValueError as error:
                problems.append(f"{key} {n}: {error}")
        return items if items or not problems else None, problems, repaired


def run_all(stories, model, journal, seed, total):
    """What generators of lists of Questions return, in order. They go on together, in rounds: each time that
    all their lists are settled. total: how many rounds there are, to tell the time left."""
    results, asked, begun, number = {}, dict.fromkeys(stories, ()), time.monotonic(), 0
    while asked:
        for story in list(asked):
            try:
                asked[story] = next(story)
            except StopIteration as end:
                results[story] = end.value
                del asked[story]
        minutes, what = (time.monotonic() - begun) / 60, f"round {number + 1} of {total}"
        what += f", about {minutes * (total - number) / number:.0f} min left" if number else ""
        number, questions = number + 1, sum(map(list, asked.values()), [])
        for _ in range(TRIES):
            pending = [question for question in questions if question.problems and not question.error]
            replies = ask_all([q.ask(seed) for q in pending], model, journal, what) if pending else ()
            for question, reply in zip(pending, replies, strict=True):
                question.take(reply)
    return [results[story] for story in stories]


def conform(value, schema, name):
    """The value with only the fields of a schema. ValueError where it does not conform to it."""
    kind = TYPES.get(schema.get("type"), str)
    if type(value) is not kind or value not in schema.get("enum", [value]):
        raise ValueError(f"{name} is {repr(value)[:60]}, not {schema.get('enum') or kind.__name__}")
    if kind is int and not schema["minimum"] <= value <= schema["maximum"]:
        raise ValueError(f"{name} is {value}, not from {schema['minimum']} to {schema['maximum']}")
    if "items" in schema:
        return [conform(item, schema["items"], f"{name}, {n}") for n, item in enumerate(value)]
    fields = schema.get("properties", {}).items()
    return {key: conform(value.get(key), part, f"{name}.{key}") for key, part in fields} if fields else value


def read_json(text, key):
    """(the value of `key` in the first object that has it, whether JSON was repaired). ValueError if none.

    Words around it are ignored, commas before a closing bracket go, and of an object that was cut off all
    that was whole remains.
    """
    text = text[max(text.find("{"), 0) :]
    for version in (text, TRAILING_COMMA.sub(lambda part: part[1] or "", text), closed(text)):
        at = version.find("{")
        while at >= 0:
            try:
                found, _ = DECODER.raw_decode(version, at)
                if key in found:
                    value = json.loads(writable(json.dumps(found[key], ensure_ascii=False)))
                    return value, version != text
            except (ValueError, RecursionError):
                pass
            at = version.find("{", at + 1)
    raise ValueError(f"no JSON object with `{key}` in the reply")


def closed(text):
    """A JSON text up to its last closing bracket, and the brackets that are still open there closed."""
    stack, end, left = [], 0, []
    for token in re.finditer(r'"(?:[^"\\]|\\.)*"?|[][{}]', text, re.DOTALL):
        if token[0] in "[{":
            stack.append("]" if token[0] == "[" else "}")
        elif token[0] in "]}":
            if not stack or stack.pop() != token[0]:
                break
            end, left = token.end(), stack.copy()
    return text[:end] + "".join(reversed(left))
