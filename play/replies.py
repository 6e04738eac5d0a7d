"""Reads replies: the actor's own part of a turn, and the name in a next-speaker answer."""

import json
import re
from collections import deque

from data.brackets import BracketParser
from data.chats import END_CHAT
from data.scenes import ENVIRONMENT, straighten

# ---- names -------------------------------------------------------------------------------------------------

HONORIFICS = set(re.findall(r"\w+", "mr mrs ms miss sir dr lady lord madam master"))
TITLES = HONORIFICS | {"the", "and", "old", "young"}  # words that identify nobody

# Thai, Lao, Burmese, Khmer, kana and Chinese characters: scripts that put no spaces between words
UNSPACED = (
    r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)


def words_of(name):
    return re.findall(r"\w+", name.casefold())


def any_of(names):
    """A regular expression for one of the names, the longest that fits."""
    return "|".join(re.escape(straighten(name)) for name in sorted(set(names), key=len, reverse=True))


def whole(name):
    """A regular expression for a name as a whole word; in scripts without spaces, anywhere."""
    before = "" if re.match(f"[{UNSPACED}]", name) else rf"(?<![^\W{UNSPACED}])"
    after = "" if re.search(rf"[{UNSPACED}]\Z", name) else rf"(?![^\W{UNSPACED}])"
    return before + re.escape(name) + after


def meant_by(name, cast):
    """The members of the cast that a form of a name fits best: `Mr Darcy` is `Mr. Fitzwilliam Darcy`."""
    words, fits = words_of(name), {}
    for member in cast:
        own = words_of(member)
        titles = [HONORIFICS & {*words}, HONORIFICS & {*own}]
        if all(titles) and titles[0].isdisjoint(titles[1]):
            continue
        shared = {*words} & {*own}
        shorter = {*words} <= {*own} | TITLES and shared - TITLES
        if shorter or (own and words[: len(own)] == own and {*own} - TITLES):
            fits[member] = len(shared)
    return [member for member, shared in fits.items() if shared == max(fits.values())]


# ---- the next speaker --------------------------------------------------------------------------------------

LABEL = (
    r"(?:\b(?:next|speaker|answer|name|character)\b[^\n.]{0,40}?(?:\bis\b|\bbe\b|[:=\u2013\u2014-])"
    r"|(?:\u4e0b\u4e00|\u6b21\u306e)[^\n\u3002]{0,12}?[\u662f\u306f\u4e3a\u70ba:\uff1a])"  # next ... is
)
OPINION = r"\b(?:think|choose|pick|say)\b(?: that)?(?: it(?:'s| is))?"
# what may follow an answer
STOPS = r"(?=\s*(?:$|\n|[^\w\s]|(?:because|since|as|is|should|will|would|next)\b))"


def parse_next_speaker(text, cast):
    """A name of the cast, END_CHAT, or None, whatever a model wrapped around it.

    Tried in order: the value in a JSON object; what follows `Next speaker:` or `I think`; the name that the
    answer or its last line begins with, if the name stands alone or a reason follows; END_CHAT anywhere; the
    last whole name in the answer; in an answer of up to eight words, part of a name that only one member of
    the cast has (`Darcy`, `Mr. Bennet`).
    """
    if text.strip() in cast:
        return text.strip()
    text = straighten(text).strip()
    text = _json_value(text) or text
    known = {straighten(name).casefold(): name for name in reversed(cast)}
    end = whole("end chat").replace(r"\ ", "[ _-]?")
    names = sorted(map(straighten, cast), key=len, reverse=True)
    name = rf"({'|'.join([*map(whole, names), end])})"
    alone = rf"\A[\W_]*{name}{STOPS}"
    found = (
        re.findall(rf"(?:{LABEL}|{OPINION})[\W_]*{name}", text, re.IGNORECASE)
        or re.findall(alone, text, re.IGNORECASE)
        or re.findall(alone, text.rsplit("\n", 1)[-1], re.IGNORECASE)
        or re.findall(f"({end})", text, re.IGNORECASE)
        or re.findall(name, text, re.IGNORECASE)
    )
    if found:
        is_end = re.match("end", found[-1], re.IGNORECASE)
        return known.get(found[-1].casefold(), END_CHAT if is_end else None)
    words = set(words_of(text))
    if len(words_of(text)) > 8:
        return None
    shared = {member: words & {*words_of(member)} for member in cast}
    scores = sorted(((len(part), member) for member, part in shared.items() if part - TITLES), reverse=True)
    unique = len(scores) == 1 or (scores and scores[0][0] > scores[1][0])
    return scores[0][1] if unique else None


def _json_value(text):
    """In a JSON object in the text, the string under a key for the next speaker, else the first; or None."""
    found = re.search(r"\{.*\}", text, re.DOTALL)
    try:
        value = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    strings = {key: v for key, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else {}
    named = [v for k, v in strings.items() if re.search("next|speaker|name|character|answer", k, re.I)]
    return (named or [*strings.values(), None])[0]


# ---- the actor's own part ----------------------------------------------------------------------------------

WORD = r"(?:(?:[^\W\d_]\.)+|(?i:mrs?|ms|dr|st|capt|prof)\.|[^\W\d_][\w'-]*)"
WORDS = rf"{WORD}(?:[ \t]+{WORD}){{0,3}}"  # what may be a name; see `looks_like_a_name`
PARTICLES = set(re.findall(r"\w+", "of the de la von van du da le al bin"))
# words that stand, capitalised, at the beginning of a line and before a colon, and are nobody's name
ORDINARY_WORDS = """
    a action actions advice aloud also although and another answer because besides but caution chapter
    choice clue conclusion correct date day dear decision dialog dialogue either emotion enough epilogue
    evidence exactly example explanation fact facts fate feedback feeling fifth finally first fourth friends
    from furthermore gentlemen goal good hear her hint his home honestly however i idea ideas if imagine
    important in indeed inner instead is issue it item ladies last lastly legend lesson let letter line list
    listen location look maybe meaning message mind mission monologue moral motto my nb never news no nor
    note notes notice now oath objection objective observe ok okay on one only option or order other our
    part perhaps picture place plan please poem point poison possibly postscript premise price prologue
    promise proof prophecy proverb ps question questions quickly quote reason recall remember reminder reply
    report response result results riddle rule rules rumor scene second secret secretly see setting seven
    short sign simple simply six sky smell so solution song sorry sound spell stage step still stop story
    subject summary surely suspect task tell ten that the then theory there therefore these they thing
    things think third this those thought thoughts three time tip title to together total translation true
    truly truth two understand up urgent verse voice vow wait warning watch we weather well what when where
    which whispers who why wish word words yes yet you your
"""
NO_NAMES = set(re.findall(r"\w+", ORDINARY_WORDS))


def clean_reply(text, character, cast):
    """What a reply adds to the play: the actor's own part, without the name in front, without repetition."""
    own, start, is_own = [], 0, True
    heads = speaker_heads(straighten(text), character, cast)  # straightening keeps positions
    for head, next_is_own in heads:
        if is_own:
            own.append(text[start : head.start()])
        start, is_own = head.end(), next_is_own
        if is_own and head.groupdict().get("action"):
            own.append(text[slice(*head.span("action"))])
    if is_own:
        own.append(text[start:])
    return cut_repetition("\n".join(part.strip() for part in own if part.strip()))


def speaker_heads(text, character, cast):
    """Yields (match, whether the character itself is meant) where a speaker's name introduces a line.

    1. A line that begins with a name of the cast, any action in parentheses, and a colon.
    2. The same with another form of such a name (`meant_by`).
    3. The same with up to four capitalised words, if somebody's words follow: a person outside the cast. Not
       in a turn of the Environment, which may narrate one, and not for ordinary words (`Note:`).
    4. Within a line, after the end of a sentence, a name of the cast and a colon.
    5. Within a line, without a space before it, a name of the cast, a colon and a bracket: a turn begun anew.

    Rules 2 to 4 do not hold within quotation marks or brackets.
    """
    cast, character = [straighten(name) for name in cast], straighten(character)

    def find(before, name, after):
        return re.finditer(rf"{before}(?P<name>{name}){after}", text, re.MULTILINE)

    def is_own(head):
        return head["name"].casefold() == character.casefold()

    names, colon = any_of([*cast, character]), r"[*]*[ \t]*[:\uff1a][*]*[ \t]*"
    line_start, action = r"^[ \t]*[-*#>]*[ \t]*", r"[*]*[ \t]*(?P<action>\([^)\n]*\))?"
    sentence_end = r"(?:(?<=[.!?\u2026)\]\"*])[ \t]+[*]*|(?<=[\u3002\uff01\uff1f])[ \t]*)"
    found = [(head, is_own(head)) for head in find(line_start, f"(?i:{names})", action + colon)]
    for head in find(line_start, WORDS, action + colon):
        if looks_like_a_name(head["name"]) and not is_enclosed(text[: head.start()]):
            if meant := meant_by(head["name"], cast):
                found.append((head, character in meant))
            elif character != ENVIRONMENT and introduces_a_person(head, text):
                found.append((head, False))
    after_sentences = find(sentence_end, names, colon)
    found += [(head, is_own(head)) for head in after_sentences if not is_enclosed(text[: head.start()])]
    stuck_names = find(r"(?<=[^\s\-'(\[\"])", names, r"[ \t]*:[ \t]*(?=[\[(])")
    found += [(head, is_own(head)) for head in stuck_names]
    end = 0
    for head, own in sorted(found, key=lambda pair: pair[0].start()):  # of two at a place, by the first rule
        if head.start() >= end:
            end = head.end()
            yield head, own


def is_enclosed(before):
    """Whether a bracket or a quotation mark is open after this text."""
    parser = BracketParser()
    deque(parser.feed(before), maxlen=0)
    return bool(parser.thoughts or parser.actions or before.count('"') % 2)


def looks_like_a_name(words):
    first, *others = words.split()
    return first[0].isupper() and all(word[0].isupper() or word in PARTICLES for word in others)


def introduces_a_person(head, text):
    """Whether words that look like a name introduce what somebody says: none of them is an ordinary word, a
    sentence, bracket or quotation follows, and the line before does not announce a quotation."""
    following = text[head.end() : head.end() + 1]
    words = {word.replace(".", "") for word in head["name"].casefold().split()}
    is_person = not (words & NO_NAMES - PARTICLES or words <= TITLES)
    speaks = following.isupper() or (following and following in '"([')
    return is_person and speaks and not text[: head.start()].rstrip().endswith(":")


def played_so_far(text, character, cast):
    """What will surely be played of a reply that is still being generated, in whole words: without a last
    line that may become another's, and without last words that may begin a name."""
    names, line = any_of(cast), straighten(text).rpartition("\n")[2]
    head = rf"[-*#>\s]*(?:(?i:{names})|{WORDS})?[*\s]*(?:\([^)]*\)?)?[*\s]*[:\uff1a]?[*\s]*"
    if re.fullmatch(head, line):
        text = text[: len(text) - len(line)]
    longest = max(map(len, cast)) + 8  # with what may stand around it
    return re.sub(r"\S+\Z", "", clean_reply(text, character, cast)[:-longest])


# ---- repetition --------------------------------------------------------------------------------------------


FIVE_TIMES = re.compile(r"(?<!\S)((?:\S++\s++){4,29}?\S++)(?:\s++\1(?!\S)){4,}")  # 5 to 30 words


def cut_repetition(text):
    """Cuts what a model stuck in a loop says.

    A run of 100 letters or more keeps 20. Of a sequence of 5 to 30 words that stands five times in a row the
    first is kept. At the second occurrence of a passage of 15 words the text ends.
    """
    text = re.sub(r"[A-Za-z]{100,}", lambda run: run[0][:20], text)
    before = None
    while before != text:
        before, text = text, FIVE_TIMES.sub(r"\1", text)
    words, seen = list(re.finditer(r"\S+", text)), set()
    for start in range(len(words) - 14):
        passage = tuple(word[0] for word in words[start : start + 15])
        if passage in seen:
            return text[: words[start].start()].rstrip()
        seen.add(passage)
    return text
