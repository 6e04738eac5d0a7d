"""Makes a scene of character cards, and a card of a book's character.

    python -m data.cards ANNA.png BEN.json --scene OUT.json --scenario "A station at night."
    python -m data.cards --from BOOK.json --character NAME --out CARD.png

The scene is a file that simulate.py plays. A card is written as .png, with a portrait of initials, or .json.
"""

import sys

from common import terminal
from common.files import UsageError, write_json
from data.cards import card_of, read_card, scene_of, write_card
from data.scenes import cast_member, find_scenes, to_test_scene


def parse_args():
    parser = terminal.Parser(__doc__, "python -m data.cards anna.png ben.json --scene out.json")
    add = parser.add_argument
    add("cards", nargs="*", metavar="CARD", help="character cards: .png, .json or .charx")
    add("--scene", metavar="OUT", help="write the cards' scene to this file")
    add("--scenario", metavar="TEXT", help="where the scene begins (default: what the cards say)")
    add("--user", metavar="NAME", help="who {{user}} is, one more of the cast (default: the next card)")
    add("--star-actions", action="store_true", help="read *waves* as (waves), the form of actions here")
    add("--from", dest="book", metavar="BOOK", help="a book or test file, or a bundled scene")
    add("--character", metavar="NAME", help="with --from: whose card to write")
    add("--out", metavar="CARD", help="with --from: the card to write, .png or .json")
    args = parser.parse_args()
    exported, staged = (args.book, args.character, args.out), (args.cards, args.scene)
    if not (all(staged) and not any(exported)) and not (all(exported) and not any(staged)):
        raise UsageError("give CARD... --scene OUT.json, or --from BOOK.json --character NAME --out CARD.png")
    return args


def main():
    args = parse_args()
    if args.book:
        scenes = find_scenes(args.book, limit=sys.maxsize)
        write_card(card_of(cast_member(args.character, scenes)[1], scenes), args.out)
        terminal.note(f'python generate.py --chat --character "{args.out}" talks with this character')
        return
    scene = scene_of([read_card(path) for path in args.cards], args.scenario, args.user, args.star_actions)
    write_json(args.scene, [to_test_scene(scene)])
    terminal.note(f'python simulate.py --scene "{args.scene}" plays this scene')


if __name__ == "__main__":
    terminal.run(main)
