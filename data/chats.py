"""Turns a scene into training chats, one a character: given-circumstance acting (CoSER paper, section 4).

`perspective` is the conversation as one character experiences it: own messages are assistant turns with their
thoughts, all others are user turns without thoughts. Simulations use the same function, so an actor sees
there what it saw in training. The loss is on assistant turns only.
"""

import random
from dataclasses import dataclass, field

from data import prompts
from data.brackets import remove_thoughts
from data.scenes import ENVIRONMENT

START = "===Conversation Start===\n\n"
END_CHAT = "<END CHAT>"
NEXT_SPEAKER = "NSP"


@dataclass
class Chat:
    """One training sample. kind: `character`, `environment` or `next_speaker`. options: of its prompt.

    parts: the messages joined in each assistant turn; None where each turn is one message.
    """

    messages: list
    character: str
    kind: str
    options: dict = field(default_factory=dict)
    parts: list | None = None


def perceived_turns(dialogue, character, thoughts=True):
    """The turns behind `perspective`: (role, [text of each message]) pairs, roles alternating from `user`."""
    turns = [("user", [START])]
    for message in dialogue:
        own = message["character"] == character
        role = "assistant" if own else "user"
        if turns[-1][0] != role:
            turns.append((role, []))
        text = message["message"] if own and thoughts else remove_thoughts(message["message"])
        name = "" if own and turns[-1][1] else f"{message['character']}: "
        turns[-1][1].append(f"{name}{text}\n\n")
    return turns


def perspective(dialogue, character, thoughts=True):
    """The conversation as `character` experiences it: user and assistant turns alternate, a user turn first.

    dialogue: list of `{character, message}`. thoughts=False removes the character's own thoughts too (the
    paper's ablation). Consecutive messages of others share a user turn, each with its speaker's name;
    consecutive own messages share an assistant turn with the name in front only once.
    """
    turns = perceived_turns(dialogue, character, thoughts)
    return [{"role": role, "content": "".join(parts)} for role, parts in turns]


def next_speaker_perspective(dialogue, names=None):
    """The conversation as the next-speaker model sees it: it answers with a name, then reads that message.

    names: the answer before each message; None: its speaker.
    """
    messages = [{"role": "user", "content": START}]
    for i, turn in enumerate(dialogue):
        messages.append({"role": "assistant", "content": names[i] if names else turn["character"]})
        shown = f"{turn['character']}: {remove_thoughts(turn['message'])}\n\n"
        messages.append({"role": "user", "content": shown})
    return messages


def draw_options(rng, thoughts=True):
    """Draws what varies between prompts, in the shares of the release (CoSER paper, appendix)."""
    return {
        "opener": rng.randrange(len(prompts.OPENERS)),
        "style": rng.choices(list(prompts.STYLES), [share for share, _ in prompts.STYLES.values()])[0],
        "plot_summary": rng.random() < 0.5,
        "motivation": rng.random() < 0.5,
        "others": rng.random() < 0.5,
        "thoughts": rng.random() < 0.5 and thoughts,
    }


def system_prompt(scene, character, options, concise=False):
    """The system prompt of a character, or of the Environment."""
    if character == ENVIRONMENT:
        return prompts.environment(scene)
    return prompts.actor(scene, character, options, concise)


def scene_to_chats(scene, epoch=0, seed=0, thoughts=True, next_speaker_share=0.1, variants="draw"):
    """The training chats of a scene: of each speaker, and in a share of scenes of the next-speaker model.

    Options are drawn from (seed, scene, character, epoch) alone, so adding a book changes no other chat.
    thoughts=False is the ablation without inner thoughts; a character who then says nothing gives no chat.
    variants: `draw` is one chat a speaker, as in the paper; `all` the release's four, with and without
    thoughts and the others' profiles (two in the ablation), the other options drawn for each.
    """
    chats, fixed = [], [{}]
    if variants == "all":
        with_thoughts = (True, False) if thoughts else (False,)
        fixed = [{"thoughts": own, "others": others} for own in with_thoughts for others in (True, False)]
    for character in scene.speaking_characters:
        rng = random.Random(f"{seed}|{scene.key}|{character}|{epoch}")
        for choice in fixed:
            options = draw_options(rng, thoughts) | choice
            turns = perceived_turns(scene.dialogues, character, options["thoughts"])
            if turns[-1][0] == "user":  # it has no loss after it
                turns.pop()
            own = [parts for role, parts in turns if role == "assistant"]
            if not any("".join(parts).removeprefix(f"{character}: ").strip() for parts in own):
                continue
            messages = [{"role": "system", "content": system_prompt(scene, character, options)}]
            messages += [{"role": role, "content": "".join(parts)} for role, parts in turns]
            kind = "environment" if character == ENVIRONMENT else "character"
            chats.append(Chat(messages, character, kind, options, own))
    rng = random.Random(f"{seed}|{scene.key}|{NEXT_SPEAKER}|{epoch}")
    if rng.random() < next_speaker_share:
        chats.append(next_speaker_chat(scene, rng))
    return chats


def next_speaker_chat(scene, rng):
    """The chat of the next-speaker model. Speakers who are minor characters are `random` 25% of the time."""
    known = {*scene.major_characters, ENVIRONMENT}
    speakers = [turn["character"] for turn in scene.dialogues]
    names = [name if name in known or rng.random() >= 0.25 else "random" for name in speakers]
    messages = [
        {"role": "system", "content": prompts.next_speaker(scene)},
        *next_speaker_perspective(scene.dialogues, names),
        {"role": "assistant", "content": END_CHAT},
    ]
    return Chat(messages, NEXT_SPEAKER, "next_speaker")
