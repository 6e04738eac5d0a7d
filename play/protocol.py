"""The rules of a performance: who acts, what each agent has read, who is next, and what of a reply is played.

Given-circumstance acting (CoSER paper, section 4.3): each agent has its own chat, in which it reads the
others without their thoughts. A round is one turn of the current speaker, after which the next-speaker model
names who follows. A performance asks for replies and never calls a model itself; everything here is pure.

There are two presets. `paper` is the protocol as published. `release` differs in five places where the code
released with the paper does something else that changes results.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass, replace

from data import prompts
from data.chats import END_CHAT, NEXT_SPEAKER, next_speaker_perspective, perspective, system_prompt
from data.scenes import ENVIRONMENT
from engine.params import SamplingParams
from llm.reply import Reply
from play.replies import clean_reply, parse_next_speaker

HUMAN = "human"  # the finish reason of a line that a person wrote


@dataclass(frozen=True)
class Protocol:
    """How a scene is played. The last five fields are True in the paper's protocol, False in the release's.

    When the next-speaker model names nobody, both draw from the same candidates (`draw_speaker`). The release
    draws from a Python `set`, in another order in each run; here the draw is seeded.
    """

    max_rounds: int = 20
    end_from_round: int = 5  # an <END CHAT> before this round index is an invalid name
    max_tokens: int = 512  # of a turn
    next_speaker_tokens: int = 32
    next_speaker_mode: str = "text"  # or "choices": a member of the cast, by probability
    temperature: float = 0.0
    retry_temperature: float = 1.0  # after an empty first try
    min_p: float = 0.0  # of turns, as repetition_penalty; see engine/params.py
    repetition_penalty: float = 1.0
    thoughts: bool = True
    continue_from: int = 0  # the number of original messages to begin with
    seed: int = 0
    # Actors read their motivation. Release: none (it looks for a key that its test set does not have).
    motivations: bool = True
    # Original messages are spoken by their own speakers. Release: by whoever is the current speaker.
    own_lines: bool = True
    # After an invalid name the next-speaker model's history has who was chosen instead. Release: it has the
    # invalid name, and the system prompt once more in the user turn that follows.
    chosen_in_history: bool = True
    # Who says nothing is passed over, and a failed reply fails the scene. Release: both are an empty message.
    silence_passes: bool = True
    # A name is found whatever is wrapped around it. Release: it is the answer up to the first colon.
    names_in_any_form: bool = True

    def named(self, text, cast):
        """The name in an answer of the next-speaker model."""
        return parse_next_speaker(text, cast) if self.names_in_any_form else text.split(":")[0].strip()


RELEASE = ("motivations", "own_lines", "chosen_in_history", "silence_passes", "names_in_any_form")
PROTOCOLS = {"paper": {}, "release": dict.fromkeys(RELEASE, False)}


@dataclass
class Call:
    """A request for one reply of the model in a role (`actor`, `environment` or `next_speaker`)."""

    role: str
    agent: str  # whose chat this is: a character, the Environment or NEXT_SPEAKER
    occasion: str  # unique within the scene: round, try, role
    messages: list
    params: SamplingParams
    opening: str = ""  # what the reply begins with: in training, a turn begins with its speaker's name


class SceneFailed(Exception):
    """The scene cannot go on, or is not worth keeping; the message says why."""


class NobodySpoke(SceneFailed):
    """Every turn was empty."""


class Performance:
    """One scene being played: its transcript so far, who speaks, and how the turn came to the speaker.

    messages: those of an earlier performance, from which this one goes on. seed: of all that follows them,
    where that is not the protocol's; each new message records it.
    """

    def __init__(self, scene, protocol, retrieval=None, messages=(), seed=None):
        self.protocol, self.retrieval = protocol, retrieval
        self.seed = protocol.seed if seed is None else seed
        self.seed_recorded = {} if self.seed == protocol.seed else {"seed": self.seed}
        self.scene = scene if protocol.motivations else replace(scene, motivations={})
        self.cast = list(dict.fromkeys([*scene.speaking_characters, ENVIRONMENT]))
        self.originals = scene.dialogues[: protocol.continue_from]
        self.messages = []  # the transcript
        self.dialogue = []  # what agents read: {character, message, sampled ids, decision}
        self.stats = dict.fromkeys(("empty", "fallbacks", "original"), 0)
        if retrieval:
            self.stats["retrieved"] = 0
        self.speaker = self.cast[0]
        self.decision = {"name": self.speaker}  # the answer the next-speaker model reads before the next turn
        self.error = None  # of the last reply that failed
        # where `play` begins: the round, whether its turn has been played, whether the scene is over
        self.round, self.turn_over, self.ended = 0, False, False
        for message in messages:
            self.replay(message)

    def replay(self, message):
        """Takes a message of an earlier performance over. A spoken one is its role's, whoever was named."""
        self.messages.append(message)
        if message["role"] == NEXT_SPEAKER:
            name, index = message["content"], self.round
            self.round, self.turn_over, self.ended = index + 1, False, name == END_CHAT
            if not self.ended:
                self.speaker = name if name in self.cast else self.draw_speaker(index)
                self.ended = self.speaker is None
            self.decision = {"name": self.speaker}
            return
        self.round += self.turn_over  # two turns without a decision between them
        if message["role"] != self.speaker:
            self.speaker = message["role"]
            self.decision = {"name": self.speaker}
        self.turn_over, self.ended = True, False
        if message["content"]:
            turn = {"character": self.speaker, "message": message["content"]}
            self.dialogue.append({**turn, "decision": self.decision})

    def play(self):
        """A coroutine that plays the scene and returns `(messages, stats)`.

        It yields a Call, to be sent the Reply, and each spoken message as a dict. messages: `{role, content}`
        in order, next-speaker decisions included as role NSP; a decision has the model's `answer` where it
        named nobody who could be next, and `probabilities` where it chose; both kinds have the model's
        `reasoning`, if any, which no chat holds, and the `seed` if it is not the protocol's; a turn has the
        passages `retrieved` for it. stats count turns:
        `empty`, `fallbacks` (next speakers drawn at random), `original`; with retrieval also the prompt
        tokens that were `retrieved`, estimated by their share of the prompts' characters.
        """
        for index in range(self.round, 0 if self.ended else self.protocol.max_rounds):
            if self.turn_over:  # in the earlier performance
                self.turn_over = False
            elif index < len(self.originals):
                yield self.original_turn(self.originals[index])
            else:
                yield from self.turn(index)
            if index == self.protocol.max_rounds - 1 or not (yield from self.choose_next_speaker(index)):
                break
        if self.stats["empty"] and len(self.dialogue) == self.stats["original"]:
            reason = f"; the last error: {self.error}" if self.error else ""
            raise NobodySpoke(f"nobody said a word in {self.stats['empty']} turn(s){reason}")
        return self.messages, self.stats

    # ---- turns

    def original_turn(self, turn):
        if self.protocol.own_lines:
            self.speaker = turn["character"]
            self.decision = {"name": self.speaker}
        self.stats["original"] += 1
        return self.say(turn["message"], Reply("", "original"))

    def turn(self, index):
        role = "environment" if self.speaker == ENVIRONMENT else "actor"
        chat = agents_chat(self.scene, self.speaker, self.dialogue, self.protocol.thoughts)
        passages, share = self.remind(chat) if self.retrieval and role == "actor" else ([], 0)
        for attempt, temperature in enumerate((self.protocol.temperature, self.protocol.retry_temperature)):
            filters = dict(min_p=self.protocol.min_p, repetition_penalty=self.protocol.repetition_penalty)
            params = SamplingParams(temperature, max_tokens=self.protocol.max_tokens, **filters)
            reply = yield from self.ask(role, chat, params, f"{index}.{attempt}")
            if passages:
                self.stats["retrieved"] += round(share * reply.prompt_tokens)
            is_human = reply.finish_reason == HUMAN
            content = reply.text.strip() if is_human else clean_reply(reply.text, self.speaker, self.cast)
            if content or is_human:
                break
        self.stats["empty"] += not content
        if content or not self.protocol.silence_passes:
            yield self.say(content, reply, passages)

    def remind(self, chat):
        """Puts passages of the book into the speaker's chat; returns them and their share of its characters.

        They stand in front of the last user turn, and in no later chat: all before it is the same from turn
        to turn, so the prefix cache has it. (The release writes them into the system prompt.)
        """
        passages = self.retrieval.find(self.scene, self.speaker, chat[1:])
        text = prompts.retrieved(passages, self.speaker) if passages else ""
        last = next(message for message in reversed(chat) if message["role"] == "user")
        last["content"] = text + last["content"]
        return passages, len(text) / sum(len(message["content"]) for message in chat)

    def say(self, content, reply, passages=()):
        """The message of the current speaker, which all agents read from now on."""
        message = {"role": self.speaker, "content": content, **recorded(reply), **self.seed_recorded}
        self.messages.append(message)
        if passages:
            self.messages[-1]["retrieved"] = passages
        if content:
            turn = {"character": self.speaker, "message": content, "sampled": sampled_ids(reply)}
            self.dialogue.append({**turn, "decision": self.decision})
        return self.messages[-1]

    # ---- who is next

    def choose_next_speaker(self, index):
        """Passes the turn on; False where the scene ends."""
        if self.protocol.own_lines and index + 1 < len(self.originals):
            following = self.originals[index + 1]["character"]
            self.messages.append({"role": NEXT_SPEAKER, "content": following})
            return True
        reply = yield from self.next_speaker_reply(index)
        name = self.protocol.named(reply.text, self.cast)
        message = {"role": NEXT_SPEAKER, "content": name, **recorded(reply), **self.seed_recorded}
        if name == END_CHAT and index >= self.protocol.end_from_round:
            self.messages.append(message)
            return False
        if name in self.cast and name != self.speaker:
            answer = name if self.protocol.chosen_in_history else reply.text.strip()
            self.speaker, self.decision = name, {"name": answer, "sampled": sampled_ids(reply)}
        else:
            self.speaker = self.draw_speaker(index)
            if self.speaker is None:
                return False
            self.decision = {"name": self.speaker}
            if not self.protocol.chosen_in_history:
                invalid = {"name": name or reply.text.strip(), "invalid": True}
                self.decision = {**invalid, "sampled": sampled_ids(reply)}
            message |= {"content": self.decision["name"], "answer": reply.text}
        self.messages.append(message)
        return True

    def next_speaker_reply(self, index):
        """The answer to who is next; an empty Reply where there is nothing to ask."""
        if index < len(self.originals) and not self.protocol.own_lines:
            follows = self.scene.dialogues[index + 1 : index + 2]
            return Reply(follows[0]["character"] if follows else END_CHAT, "original")
        has_spoken = self.dialogue and self.dialogue[-1]["character"] == self.speaker
        if self.protocol.silence_passes and not has_spoken:  # passed over without a question
            return Reply("", "silence")
        choices = None
        if self.protocol.next_speaker_mode == "choices":
            choices = [name for name in self.cast if name not in (self.speaker, END_CHAT)]
            choices += [END_CHAT] * (index >= self.protocol.end_from_round)
            if not choices:
                return Reply("", "alone")
        limit = self.protocol.next_speaker_tokens
        params = SamplingParams(self.protocol.temperature, max_tokens=limit, choices=choices)
        chat = next_speakers_chat(self.scene, self.dialogue)
        return (yield from self.ask("next_speaker", chat, params, f"{index}"))

    def draw_speaker(self, index):
        """A seeded choice of the major characters and the Environment, else of the cast, without the current
        and the last speaker; None if nobody is left."""
        self.stats["fallbacks"] += 1
        excluded = {self.speaker}
        if self.protocol.silence_passes and self.dialogue:
            excluded.add(self.dialogue[-1]["character"])  # differs if the current speaker said nothing
        majors = [name for name in [*self.scene.major_characters, ENVIRONMENT] if name not in excluded]
        candidates = majors or [name for name in self.cast if name not in excluded]
        rng = random.Random(f"{self.seed}|{self.scene.key}|{index}")
        return rng.choice(candidates) if candidates else None

    # ---- asking

    def ask(self, role, chat, params, occasion):
        """The Reply of the model in a role, with a seed of this occasion's own."""
        digest = hashlib.sha256(f"{self.seed}|{self.scene.key}|{occasion}|{role}".encode()).digest()
        params = replace(params, seed=int.from_bytes(digest[:4], "big"))
        is_actor = role != "next_speaker"
        agent, opening = (self.speaker, f"{self.speaker}:") if is_actor else (NEXT_SPEAKER, "")
        reply = yield Call(role, agent, f"{occasion}|{role}", chat, params, opening)
        self.error = reply.error or self.error
        if reply.error is not None and self.protocol.silence_passes:
            raise SceneFailed(reply.error)
        return reply


def recorded(reply):
    """What a transcript's message keeps of a reply besides its content."""
    kept = {} if reply.probabilities is None else {"probabilities": reply.probabilities}
    kept |= {"human": True} if reply.finish_reason == HUMAN else {}
    return {**kept, "reasoning": reply.reasoning} if reply.reasoning else kept


def sampled_ids(reply):
    """The ids of a reply, to be read again as sampled; None with reasoning, which nobody reads again."""
    return None if reply.reasoning else reply.ids


# ---- chats -------------------------------------------------------------------------------------------------


def agents_chat(scene, character, dialogue, thoughts=True):
    """The chat of an actor or the Environment, built as in training; own turns carry their sampled ids."""
    options = {**prompts.AT_PLAY, "thoughts": thoughts}
    chat = [{"role": "system", "content": system_prompt(scene, character, options, concise=True)}]
    chat += perspective(dialogue, character, thoughts)
    by_speaker = itertools.groupby(dialogue, lambda turn: turn["character"] == character)
    own_turns = [next(turns) for own, turns in by_speaker if own]  # the first turn of each assistant message
    own_messages = [message for message in chat if message["role"] == "assistant"]
    for message, turn in zip(own_messages, own_turns, strict=True):
        if turn.get("sampled"):
            message |= {"opening": f"{character}:", "sampled": turn["sampled"]}
    return chat


def next_speakers_chat(scene, dialogue):
    """The chat of the next-speaker model, built as in training; its answers are the turns' `decision`s."""
    system = prompts.next_speaker(scene)
    decisions = [turn.get("decision") or {"name": turn["character"]} for turn in dialogue]
    chat = next_speaker_perspective(dialogue, [decision["name"] for decision in decisions])
    for answer, shown, decision in zip(chat[1::2], chat[2::2], decisions, strict=True):
        if decision.get("sampled"):
            answer |= {"opening": "", "sampled": decision["sampled"]}
        if decision.get("invalid"):
            shown["content"] = f"{system}\n\n{shown['content']}"
    return [{"role": "system", "content": system}, *chat]
