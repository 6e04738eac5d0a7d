"""Reads and writes character cards: V1, V2 and V3, as JSON, in a PNG's text chunks, or in a CHARX (a zip).

Cards come from strangers: every size is bounded before anything is unpacked or parsed, and whatever cannot be
read is a UsageError of one line. A field of the wrong type counts as absent; unknown fields are kept.
"""

import base64
import binascii
import hashlib
import io
import json
import zipfile
import zlib
from dataclasses import dataclass, field, fields
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from common.files import UsageError, write_json, write_whole
from data.records import LONGEST, Report, mend_surrogates

LONGEST_FILE = 32 * 2**20  # bytes
LONGEST_JSON = 8 * 2**20  # bytes of a card's JSON, unpacked
DEEPEST = 100  # lists and objects within each other
ZIP_MEMBERS = 10_000
PNG, ZIP = b"\x89PNG\r\n\x1a\n", b"PK\x03\x04"
KEYWORDS = ("ccv3", "chara")  # of the text chunks, the preferred one first: V3, then V1 or V2
V1_FIELDS = ("name", "description", "personality", "scenario", "first_mes", "mes_example")
SIZE = 400, 600  # of the picture of a written PNG


@dataclass
class Card:
    """A character card, its text as written: macros are not expanded.

    `book` is the `character_book` (lorebook) as a JSON object; `other` holds the fields that have no
    attribute, so that a card which is read and written keeps them.
    """

    name: str
    description: str = ""
    personality: str = ""
    scenario: str = ""
    first_mes: str = ""
    mes_example: str = ""
    creator_notes: str = ""
    system_prompt: str = ""
    post_history_instructions: str = ""
    alternate_greetings: list = field(default_factory=list)
    tags: list = field(default_factory=list)
    creator: str = ""
    character_version: str = ""
    extensions: dict = field(default_factory=dict)
    nickname: str = ""
    group_only_greetings: list = field(default_factory=list)
    book: dict = field(default_factory=dict)
    other: dict = field(default_factory=dict)

    def to_dict(self):
        """The `data` object of a V2 or V3 card."""
        data = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("book", "other")}
        optional = {"character_book": self.book, "nickname": data.pop("nickname")}
        return {**self.other, **data, **{name: value for name, value in optional.items() if value}}


# ---- reading -----------------------------------------------------------------------------------------------


def read_card(source):
    """The Card in a file (a path) or in its bytes. UsageError, in one line, for anything else."""
    data, where = (source, "card") if isinstance(source, bytes) else (_read_bytes(source), str(source))
    if len(data) > LONGEST_FILE:
        raise UsageError(f"{where}: larger than {LONGEST_FILE >> 20} MiB, too much for a card")
    if data.startswith(PNG):
        data = _json_of_png(data, where)
    elif data.startswith(ZIP):
        data = _json_of_zip(data, where)
    return _card_of(_parse(data, where), where)


def _read_bytes(path):
    try:
        with open(path, "rb") as file:
            return file.read(LONGEST_FILE + 1)
    except (OSError, ValueError) as error:  # also a null byte in the path
        raise UsageError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None


def _json_of_png(data, where):
    texts, position, kind = {}, len(PNG), b""
    while kind != b"IEND":
        length, kind = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        end = position + 12 + length
        checksum = int.from_bytes(data[end - 4 : end])
        if end > len(data) or zlib.crc32(data[position + 4 : end - 4]) != checksum:
            raise UsageError(f"{where}: a PNG that is cut off or damaged; download it again")
        keyword, _, content = data[position + 8 : end - 4].partition(b"\0")
        if kind in (b"tEXt", b"iTXt"):
            texts.setdefault(keyword.decode("latin-1").lower(), (kind, content))
        position = end
    found = [texts[keyword] for keyword in KEYWORDS if keyword in texts]
    if not found:
        raise UsageError(f"{where}: a PNG without a card in it (no text chunk `ccv3` or `chara`)")
    kind, text = found[0]
    if kind == b"iTXt":
        compressed, text = text[:1] == b"\1", text[2:].split(b"\0", 2)[-1]
        text = _unpack(text, where) if compressed else text
    try:
        text = b"".join(text.split()).rstrip(b"=")  # old cards: line ends, or no padding
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error:
        raise UsageError(f"{where}: the card in this PNG is not base64 text") from None


def _unpack(content, where):
    try:
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(content, 2 * LONGEST_JSON)
    except zlib.error as error:
        raise UsageError(f"{where}: the card in this PNG cannot be unpacked ({error})") from None
    if unpacker.unconsumed_tail:
        raise UsageError(f"{where}: the card in this PNG unpacks to more than {LONGEST_JSON >> 20} MiB")
    return text


def _json_of_zip(data, where):
    if data.count(b"PK\1\2") > ZIP_MEMBERS:
        raise UsageError(f"{where}: a zip of more than {ZIP_MEMBERS:,} files")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            info = archive.getinfo("card.json")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
                raise UsageError(f"{where}: its card.json is encrypted, or compressed in an unusual way")
            with archive.open(info) as file:
                return file.read(LONGEST_JSON + 1)
    except KeyError:
        raise UsageError(f"{where}: a zip without a card.json; a CHARX file has one") from None
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, NotImplementedError) as error:
        raise UsageError(f"{where}: a CHARX (zip) that cannot be read ({error})") from None


def _parse(data, where):
    if len(data) > LONGEST_JSON:
        raise UsageError(f"{where}: more than {LONGEST_JSON >> 20} MiB of JSON, too much for a card")
    try:
        value = json.loads(data.decode("utf-8-sig"))
        json.dumps(value, allow_nan=False)
    except (RecursionError, ValueError) as error:
        raise UsageError(f"{where}: neither PNG, CHARX nor proper JSON ({error})") from None
    level = [value]
    for _ in range(DEEPEST):
        inner = [item for item in level if isinstance(item, dict | list)]
        level = [v for item in inner for v in (item.values() if isinstance(item, dict) else item)]
    if level:
        raise UsageError(f"{where}: JSON nested more than {DEEPEST} deep")
    if not isinstance(value, dict):
        raise UsageError(f"{where}: a {type(value).__name__} where a card (a JSON object) is expected")
    return mend_surrogates(value, where, Report())


def _card_of(value, where):
    """The Card of a JSON object. V1 fields that exports keep beside `data` may be older, and do not count."""
    data = value["data"] if isinstance(value.get("data"), dict) else value
    if isinstance(data.get("entries"), list | dict) and "first_mes" not in data:
        raise UsageError(f"{where}: a lorebook by itself; a card holds one as `character_book`")
    keys = {f.name: f.name for f in fields(Card) if f.name != "other"} | {"book": "character_book"}
    card = Card("", other={key: content for key, content in data.items() if key not in keys.values()})
    for name, key in keys.items():
        content = data.get(key)
        if isinstance(content, list):
            content = [item for item in content if isinstance(item, str)]
        if isinstance(content, type(getattr(card, name))):
            setattr(card, name, content)
            texts = content if isinstance(content, list) else [content] if isinstance(content, str) else []
            if any(len(text) > LONGEST for text in texts):
                raise UsageError(f"{where}: `{key}` has more than {LONGEST:,} characters")
    if not (card.name.strip() or card.nickname.strip()):
        raise UsageError(f"{where}: no character card (it has no `name`)")
    return card


# ---- writing -----------------------------------------------------------------------------------------------


def write_card(card, path):
    """Writes a card: a `.json` is a V3 object with V1's fields beside it, a `.png` holds both V3 and V2."""
    data, suffix = card.to_dict(), Path(path).suffix.lower()
    v3 = {"spec": "chara_card_v3", "spec_version": "3.0", "data": data}
    if suffix == ".json":
        write_json(path, {**{name: data[name] for name in V1_FIELDS}, **v3})
    elif suffix == ".png":
        chunks, v2 = PngInfo(), {**v3, "spec": "chara_card_v2", "spec_version": "2.0"}
        for keyword, value in zip(KEYWORDS, (v3, v2), strict=True):
            chunks.add_text(keyword, base64.b64encode(json.dumps(value).encode()).decode())
        with write_whole(path, "wb") as file:
            _picture(card.nickname or card.name).save(file, "PNG", pnginfo=chunks)
    else:
        raise UsageError(f"{path}: a card is written as .png or .json")


def _picture(name):
    """A portrait: the initials of a name on a colour of its own."""
    digest = hashlib.sha256(name.encode()).digest()
    picture = Image.new("RGB", SIZE, f"hsl({digest[0] * 360 // 256}, 45%, {30 + digest[1] % 20}%)")
    initials = "".join(word[0] for word in name.split()[:2] if word[0].isprintable()).upper()
    draw, middle = ImageDraw.Draw(picture), (SIZE[0] // 2, SIZE[1] // 2)
    draw.text(middle, initials, fill="white", anchor="mm", font=ImageFont.load_default(160))
    return picture
