"""The rules of a performance: who acts, what each agent has read, who is next, what of a reply is played.

Given-circumstance acting (coser paper, section 4.3): each agent has a chat of its own, in which it reads the others without
their thoughts. A round is one turn of the current speaker, then the next-speaker model names who follows. `play` is the
performance of one scene as a coroutine that asks for replies and never asks a model itself; all in here is pure.

Two presets. `paper` is the protocol as published; `release` differs in the five places where the code released with it does
something else that changes results. Its other traps (a fallback that differs from run to run, results written only at the end,
output paths that leave out settings, a failing server asked forever) change no rule of the play, and neither preset has them.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass, replace

from data import prompts
from data.chats import END_CHAT, NEXT_SPEAKER, next_speaker_perspective, perspective, system_prompt
from data.scenes import ENVIRONMENT
from engine.params import SamplingParams
from play.replies import clean_reply, parse_next_speaker


@dataclass(frozen=True)
class Protocol:
    """What decides how a scene is played; the last five fields are what `release` turns off.

    The release's fallback draws from the same candidates as ours (major characters and Environment, else the cast, without
    the current speaker), but in the order of a `set`, so another one in each run; here it is seeded in both.
    """

    max_rounds: int = 20
    end_from_round: int = 5  # an <END CHAT> before this round index is an invalid name
    max_tokens: int = 512  # of an actor's turn
    next_speaker_tokens: int = 32
    next_speaker_mode: str = "text"  # or "choices": one of the cast by its probability
    temperature: float = 0.0
    retry_temperature: float = 1.0  # when the first try came out empty
    thoughts: bool = True
    continue_from: int = 0  # so many messages are the original ones
    seed: int = 0
    motivations: bool = (
        True  # off: actors are told none (the release looks for a key its test set does not have)
    )
    own_lines: bool = (
        True  # original lines are said by those who said them; off: by whoever the play has come to
    )
    chosen_in_history: bool = (
        True  # after an invalid name the next-speaker model reads who was chosen instead; off: it reads
    )
    # the invalid name, and its system prompt again as a user turn
    silence_passes: bool = (
        True  # one who says nothing is passed over, a failed reply ends the scene with an error; off: either
    )
    # is an empty message, which counts
    names_in_any_form: bool = (
        True  # a name is read out of what is wrapped around it; off: it is the answer up to a first colon
    )

    def named(self, text, cast):
        """The name in an answer of the next-speaker model."""
        return parse_next_speaker(text, cast) if self.names_in_any_form else text.split(":")[0].strip()


OFF = ("motivations", "own_lines", "chosen_in_history", "silence_passes", "names_in_any_form")


PROTOCOLS = {"paper": {}, "release": dict.fromkeys(OFF, False)}


@dataclass
class Call:
    """What a scene waits for: one reply of the model in a role (`actor`, `environment` or `next_speaker`)."""

    role: str
    agent: str  # who speaks, or NSP
    occasion: str  # unique within the scene: round, try, role
    messages: list
    params: SamplingParams
    opening: str = ""  # what the reply begins with: in training, a turn begins with its speaker's name


class SceneFailed(Exception):
    """A reply that a scene cannot go on without did not come; the message says why."""


def play(scene, protocol):
    """The performance of a scene as a coroutine, which returns `(messages, stats)`.

    It yields a Call, to be sent `(reply, number of the run in which it came)`, and a message dict for all that is said, so that
    whoever drives the scene can show it at once. messages: `{role, content}` in order, next-speaker decisions included as role
    NSP, with the model's `answer` where it named no one who could be next, and `probabilities` where it chose. stats are token
    counts: `decoded`; `prefilled`, which the model read for this scene's agents; `cached`, which it did not need to (what it
    knew from another agent's chat counts as read, what a resumed run reads again does not: so they do not depend on the
    company); `least`, which it could not have done without: of each agent's chat at its last call, all tokens but those it had
    sampled itself.
    """
    scene = scene if protocol.motivations else replace(scene, motivations={})
    cast = list(dict.fromkeys([*scene.speaking_characters, ENVIRONMENT]))
    dialogue, messages, last = [], [], {}
    stats = dict.fromkeys(("prefilled", "decoded", "cached", "least", "empty", "fallbacks", "original"), 0)
    speaker = cast[0]
    decision = {
        "name": speaker
    }  # how the turn to come was given to its speaker: a part of it, once it is in the dialogue

    def say(content, sampled=None):
        messages.append({"role": speaker, "content": content})
        if content:
            dialogue.append(
                {"character": speaker, "message": content, "sampled": sampled, "decision": decision}
            )
        return messages[-1]

    def ask(role, agent, chat, max_tokens, temperature, occasion, choices=None):
        digest = hashlib.sha256(f"{protocol.seed}|{scene.key}|{occasion}|{role}".encode()).digest()
        seed = int.from_bytes(digest[:4], "big")
        params = SamplingParams(temperature, max_tokens=max_tokens, seed=seed, choices=choices)
        opening = "" if role == "next_speaker" else f"{agent}:"
        reply, run = yield Call(role, agent, f"{occasion}|{role}", chat, params, opening)
        if reply.error is not None:
            if protocol.silence_passes:
                raise SceneFailed(reply.error)
            return reply
        cached = cached_tokens(reply, *last.get(agent, (None, run)), run)
        last[agent] = reply, run
        stats["prefilled"] += reply.prompt_tokens - cached
        stats["cached"] += cached
        stats["decoded"] += reply.completion_tokens
        return reply

    for index in range(protocol.max_rounds):
        given = index < min(protocol.continue_from, len(scene.dialogues))
        follows = (
            scene.dialogues[index + 1]["character"] if given and index + 1 < len(scene.dialogues) else None
        )
        if given:
            speaker = scene.dialogues[index]["character"] if protocol.own_lines else speaker
            decision = {"name": speaker} if protocol.own_lines else decision
            stats["original"] += 1
            yield say(scene.dialogues[index]["message"])
            if (
                protocol.own_lines
                and follows
                and index + 1 < min(protocol.continue_from, protocol.max_rounds)
            ):
                messages.append({"role": NEXT_SPEAKER, "content": follows})
                continue
        else:
            role = "environment" if speaker == ENVIRONMENT else "actor"
            chat = agents_chat(scene, speaker, dialogue, protocol.thoughts)
            content = ""
            for attempt, temperature in enumerate((protocol.temperature, protocol.retry_temperature)):
                reply = yield from ask(
                    role, speaker, chat, protocol.max_tokens, temperature, f"{index}.{attempt}"
                )
                content = clean_reply(reply.text, speaker, cast)
                if content:
                    break
            stats["empty"] += not content
            if content or not protocol.silence_passes:
                yield say(content, reply.ids)
        if index == protocol.max_rounds - 1:
            break
        text, reply = "", None
        if given and not protocol.own_lines:
            text = follows or END_CHAT
        elif not protocol.silence_passes or (dialogue and dialogue[-1]["character"] == speaker):
            # one who said nothing is passed over without a question
            choices = None
            if protocol.next_speaker_mode == "choices":
                choices = [name for name in cast if name not in (speaker, END_CHAT)]
                choices += [END_CHAT] * (index >= protocol.end_from_round)
            if choices != []:  # else there is nobody to ask about
                reply = yield from ask(
                    "next_speaker",
                    NEXT_SPEAKER,
                    next_speakers_chat(scene, dialogue),
                    protocol.next_speaker_tokens,
                    protocol.temperature,
                    f"{index}",
                    choices,
                )
                text = reply.text
        named = protocol.named(text, cast)
        message = {"role": NEXT_SPEAKER, "content": named}
        if reply is not None and reply.probabilities is not None:
            message["probabilities"] = reply.probabilities
        sampled = reply.ids if reply is not None else None
        if named == END_CHAT and index >= protocol.end_from_round:
            messages.append(message)
            break
        if named in cast and named != speaker:
            said = named if protocol.chosen_in_history else text.strip()
            speaker, decision = named, {"name": said, "sampled": sampled}
        else:
            stats["fallbacks"] += 1
            without = {speaker}
            if protocol.silence_passes and dialogue:  # another one, if the speaker had nothing to say
                without.add(dialogue[-1]["character"])
            speaker = fall_back(scene, cast, without, f"{protocol.seed}|{scene.key}|{index}")
            if speaker is None:
                break
            invalid = named or text.strip()
            decision = (
                {"name": speaker}
                if protocol.chosen_in_history
                else {"name": invalid, "sampled": sampled, "invalid": True}
            )
            message |= {"content": decision["name"], "answer": text}
        messages.append(message)
    stats["least"] = sum(reply.prompt_tokens - reply.own_tokens for reply, _ in last.values())
    return messages, stats


def cached_tokens(reply, before, run_before, run):
    """How many of a reply's prompt tokens its agent had in the cache: as measured, but no more than its call before had left
    there, and as much as that where the call before came in a run that was interrupted since."""
    if reply.ids is None:  # an endpoint's own count
        return reply.cached_tokens
    left = 0
    if before is not None:
        kept = reply.own_tokens - before.own_tokens  # of what it sampled then
        unread = (
            kept == len(before.ids) and before.finish_reason == "length"
        )  # the last token was never an input
        left = min(before.prompt_tokens + kept - unread, reply.prompt_tokens - 1)
    return left if run != run_before else min(reply.cached_tokens, left)


def agents_chat(scene, character, dialogue, thoughts=True):
    """The chat of an actor or the Environment: built as in training, own turns with the ids they were sampled as."""
    options = {**prompts.AT_PLAY, "thoughts": thoughts}
    chat = [{"role": "system", "content": system_prompt(scene, character, options, concise=True)}]
    chat += perspective(dialogue, character, thoughts)
    runs = [
        list(turns)
        for own, turns in itertools.groupby(dialogue, lambda turn: turn["character"] == character)
        if own
    ]
    for message, turns in zip([m for m in chat if m["role"] == "assistant"], runs, strict=True):
        if turns[0].get("sampled"):
            message |= {"opening": f"{character}:", "sampled": turns[0]["sampled"]}
    return chat


def next_speakers_chat(scene, dialogue):
    """The chat of the next-speaker model: built as in training; its answers are those it gave, for turns with a `decision`."""
    system = prompts.next_speaker(scene)
    decisions = [turn.get("decision") or {"name": turn["character"]} for turn in dialogue]
    chat = next_speaker_perspective(dialogue, [decision["name"] for decision in decisions])
    for answer, shown, decision in zip(chat[1::2], chat[2::2], decisions, strict=True):
        if decision.get("sampled"):
            answer |= {"opening": "", "sampled": decision["sampled"]}
        if decision.get("invalid"):
            shown["content"] = f"{system}\n\n{shown['content']}"
    return [{"role": "system", "content": system}, *chat]


def fall_back(scene, cast, without, seed):
    """Who speaks when the next-speaker model named nobody: a seeded choice of the major characters and the Environment, else
    of the cast; nobody (None) where all of them are in `without`."""
    candidates = [name for name in [*scene.major_characters, ENVIRONMENT] if name not in without]
    candidates = candidates or [name for name in cast if name not in without]
    return random.Random(seed).choice(candidates) if candidates else None
