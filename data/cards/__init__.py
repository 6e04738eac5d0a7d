"""Character cards, as SillyTavern and others exchange them: read, written, and put on stage.

A card's description and personality are a character's profile, with the lorebook entries that are called up;
its post-history instructions are the motivation, its first message is the first line. Nothing of a card is
ever more than text.
"""

import re
from dataclasses import dataclass

from common.files import UsageError
from data.brackets import remove_thoughts
from data.cards.files import Card, read_card, write_card
from data.cards.prompts import DEPTH, PLACES, Macros, called_up
from data.chats import END_CHAT, NEXT_SPEAKER
from data.scenes import ENVIRONMENT, Scene

__all__ = ["Card", "Part", "card_of", "part_of", "read_card", "scene_of", "staged", "write_card"]

VISITOR = "Visitor"  # who `{{user}}` is where nobody is named
LONGEST_NAME = 100  # characters
MOST_GREETINGS, MOST_EXAMPLES = 5, 3  # of an exported character


@dataclass
class Part:
    """What a card gives its player at one point of a conversation, macros expanded.

    greetings: its possible first messages. instructions: those that follow the conversation. notes: (depth,
    text) pairs that belong into the conversation, `depth` messages from its end. system_prompt, macros: see
    `opening`.
    """

    name: str
    profile: str
    scenario: str
    greetings: list
    instructions: str
    notes: list
    system_prompt: str
    macros: Macros

    def opening(self, original):
        """The card's own system prompt, which replaces how ours begins and may contain that."""
        return self.macros.expand(self.system_prompt, original=original).strip() or original


def one_line(name):
    return " ".join(name.split())[:LONGEST_NAME].strip()


def stage_name(name):
    """A name as a scene can have it. UsageError for one with another meaning."""
    name = one_line(name)
    if name in (ENVIRONMENT, NEXT_SPEAKER, END_CHAT, "random"):
        raise UsageError(f"a character cannot be called {name}, which has a meaning of its own; rename it")
    return name


def part_of(
    card, user=VISITOR, heard=(), examples=True, actions=False, count=lambda text: len(text) // 4, seed=0
):
    """The Part of a card.

    user: the name of whom it talks with. heard: the texts so far, which are searched for the lorebook's keys.
    examples: whether the profile has the example dialogue. actions: read `*waves*` as `(waves)`. count: text
    -> number of tokens, for the lorebook's budget. seed: of the macros that draw.
    """
    name = stage_name(card.nickname.strip() or card.name)
    macros, acted = Macros(name, user, seed), with_actions if actions else str
    text = macros.fields
    for field in ("personality", "scenario", "description"):  # macros themselves, of the ones after them
        text[field] = macros.expand(getattr(card, field)).strip()
    lore = called_up(card.book, heard, macros, count)
    before, after, where = ([content for place, content in lore if place == at] for at in PLACES)
    profile = [*before, text["description"], text["personality"], *after]
    talk = re.sub(r"(?im)^[^\S\n]*<start>[^\S\n]*", "", macros.expand(card.mes_example)).strip()
    if talk and examples:
        profile.append(f"How {name} talks, for example:\n\n{acted(talk)}")
    greetings = [macros.expand(greeting).strip() for greeting in (card.first_mes, *card.alternate_greetings)]
    return Part(
        name,
        profile=paragraphs(profile),
        scenario=paragraphs([text["scenario"], *where]),
        greetings=[acted(greeting) for greeting in greetings if greeting],
        instructions=macros.expand(card.post_history_instructions, original="").strip(),
        notes=[note for note in lore if isinstance(note[0], int)] + own_notes(card, macros),
        system_prompt=card.system_prompt,
        macros=macros,
    )


def own_notes(card, macros):
    """SillyTavern's note on a character, as a list of at most one (depth, text) pair."""
    note = card.extensions.get("depth_prompt")
    note = note if isinstance(note, dict) and isinstance(note.get("prompt"), str) else {"prompt": ""}
    depth = note["depth"] if isinstance(note.get("depth"), int) and note["depth"] >= 0 else DEPTH
    text = macros.expand(note["prompt"]).strip()
    return [(depth, text)] if text else []


def paragraphs(texts):
    return "\n\n".join(filter(None, texts))


def with_actions(text):
    """`*waves*` as `(waves)`, the form of an action on stage; **bold** stays."""
    return re.sub(r"(?<!\*)\*([^*\n]+)\*(?!\*)", r"(\1)", text)


def scene_of(cards, scenario=None, user=None, actions=False):
    """A Scene for the characters of some cards, the first of whom speaks first.

    scenario: None takes those of the cards. user: who `{{user}}` is, one more of the cast; None: the next
    card's character, or, of a single card, a visitor who is not in the scene. UsageError for two characters
    of one name, or without anything to begin with.
    """
    names, user = [part_of(card).name for card in cards], user and stage_name(user)
    if len(set(names)) < len(names) or user in names:
        raise UsageError(f"two of the scene's characters have the same name ({', '.join(names)}); rename one")
    users = [user] * len(cards) if user else [*names[1:], names[0]] if len(cards) > 1 else [VISITOR]
    pairs = [*zip(cards, users, strict=True)]
    begun = [part_of(card, other, actions=actions) for card, other in pairs]
    first = begun[0].greetings[:1]
    heard = [scenario or "\n".join(part.scenario for part in begun), *first]
    parts = [part_of(card, other, heard, actions=actions) for card, other in pairs]
    scenario = scenario or paragraphs(dict.fromkeys(part.scenario for part in parts))
    if not (first or scenario):
        raise UsageError(f"the card of {names[0]} has no first message, and there is no scenario; give one")
    opening = {"character": names[0] if first else ENVIRONMENT, "message": first[0] if first else scenario}
    scene = staged(parts, cards[0], scenario, [opening])
    scene.speaking_characters = [*names, *([user] if user else [])]
    return scene


def staged(parts, card, scenario, dialogues=()):
    """A Scene of the parts; card: who says which book it is from, if it was made from one."""
    origin, names = card.extensions.get("coser"), [part.name for part in parts]
    book = origin.get("book") if isinstance(origin, dict) else None
    book = one_line(book) if isinstance(book, str) else ""
    profiles = {part.name: part.profile for part in parts if part.profile}
    motivations = {part.name: part.instructions for part in parts if part.instructions}
    return Scene(
        book or "an untitled story", i_p=0, i_c=0, tag="ood", scenario=scenario, topic=" and ".join(names),
        plot_summary="", dialogues=[*dialogues], speaking_characters=names, major_characters=names,
        profiles=profiles, motivations=motivations,
    )  # fmt: skip


def card_of(name, scenes):
    """The Card of a character of a book.

    Their first scene gives scenario, motivation and first message; the first lines in further ones are
    alternate greetings, and answers to others the example dialogue. Thoughts stay in the book.
    """
    scenes = [scene for scene in scenes if name in scene.profiles]
    spoken = [[(turn["character"], remove_thoughts(turn["message"])) for turn in s.dialogues] for s in scenes]
    spoken = [[turn for turn in turns if turn[1]] for turns in spoken]
    greetings = [next((text for who, text in turns if who == name), "") for turns in spoken]
    start = next((i for i, greeting in enumerate(greetings) if greeting), 0)
    scene, examples = scenes[start], []
    for turns in spoken:
        for (other, line), (who, answer) in zip(turns, turns[1:], strict=False):
            if other not in (name, ENVIRONMENT) and who == name and answer != greetings[start]:
                examples.append(f"<START>\n{other}: {line}\n{name}: {answer}")
                break
    return Card(
        name,
        description=scene.profiles[name],
        scenario=scene.scenario,
        first_mes=greetings[start],
        mes_example="\n".join(examples[:MOST_EXAMPLES]),
        post_history_instructions=scene.motivations.get(name, ""),
        alternate_greetings=list(filter(None, greetings[start + 1 :]))[:MOST_GREETINGS],
        creator_notes=f"{name}, from {scene.book}. Actions are in (round brackets).",
        tags=[scene.book],
        extensions={"coser": {"book": scene.book}},
    )
