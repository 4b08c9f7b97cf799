"""Writes the example dataset: what somebody says to a house, and the command it means, as JSON.

    python examples/data/make_data.py

Every row is a conversation of three messages: a fixed instruction, the request, and the answer
`{"device": ..., "room": ..., "action": ..., "value": ...}`, in which what was not said is null. Requests are put
together from the phrases below with a fixed seed. No request is in both files; the validation file also has rooms,
values and openings that the training file never shows, so that learning the phrases by heart is not enough.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

SYSTEM = "Turn the request into JSON with device, room, action and value."

ROOMS = (
    *("kitchen", "bathroom", "bedroom", "hall", "cellar", "garage", "office", "study", "nursery", "living room"),
    *("dining room", "guest room", "workshop", "pantry", "corridor"),
)
VALIDATION_ROOMS = ("attic", "library", "laundry room", "playroom")
OPENINGS = ("", "", "", "", "please ", "could you ", "can you ", "hey, ", "would you please ", "I'd like you to ")
VALIDATION_OPENINGS = ("be so kind and ", "I want you to ")
ENDINGS = ("", "", "", "", " please", ", thanks", " now", " for me", " right away")
COLOURS = ("red", "blue", "green", "warm white", "orange", "purple")
VALIDATION_COLOURS = ("yellow", "pink")
MUSIC = ("jazz", "the news", "rock", "piano music", "the radio", "folk songs")
VALIDATION_MUSIC = ("opera", "guitar music")
NUMBER_WORDS = {"half": 50, "a quarter": 25, "three quarters": 75}


@dataclass(frozen=True)
class Intent:
    """One command and the ways to say it; `{room}` becomes " in the kitchen" or nothing, `{value}` the value said."""

    device: str
    action: str
    value: str | None  # which kind of value: percent, degrees, oven, level, minutes, colour, music, or None
    commands: tuple[str, ...]  # can follow an opening such as "please"
    remarks: tuple[str, ...] = ()  # whole sentences, which take neither opening nor ending


INTENTS = (
    Intent(
        "light",
        "on",
        None,
        ("turn on the light{room}", "switch the lights on{room}", "turn the lamp{room} on", "light the lamp{room}"),
        ("it is too dark{room}", "I can't see anything{room}", "lights on{room}"),
    ),
    Intent(
        "light",
        "off",
        None,
        (
            "turn off the light{room}",
            "switch the lights off{room}",
            "put out the lamp{room}",
            "turn the lights{room} off",
        ),
        ("lights off{room}", "nobody needs the light{room} any more"),
    ),
    Intent(
        "light",
        "set",
        "percent",
        ("dim the light{room} to {value}", "set the lights{room} to {value}", "bring the lamp{room} to {value}"),
        ("I want {value} light{room}",),
    ),
    Intent(
        "light",
        "colour",
        "colour",
        ("make the light{room} {value}", "change the lamp{room} to {value}", "turn the lights {value}{room}"),
    ),
    Intent(
        "heating",
        "set",
        "degrees",
        (
            "set the heating{room} to {value}",
            "heat to {value}{room}",
            "turn the thermostat{room} to {value}",
            "make it {value}{room}",
        ),
        ("it should be {value}{room}",),
    ),
    Intent(
        "heating",
        "on",
        None,
        ("turn on the heating{room}", "switch the radiator on{room}", "start heating{room}"),
        ("it is too cold{room}", "I am freezing{room}"),
    ),
    Intent(
        "heating",
        "off",
        None,
        ("turn off the heating{room}", "switch the radiator off{room}", "stop heating{room}"),
        ("it is too warm{room}", "no more heating{room}"),
    ),
    Intent(
        "blinds",
        "open",
        None,
        ("open the blinds{room}", "pull up the blinds{room}", "raise the shutters{room}", "let the sun in{room}"),
    ),
    Intent(
        "blinds",
        "close",
        None,
        ("close the blinds{room}", "pull down the blinds{room}", "lower the shutters{room}", "keep the sun out{room}"),
    ),
    Intent(
        "blinds",
        "set",
        "percent",
        ("close the blinds{room} to {value}", "set the blinds{room} to {value}", "put the shutters at {value}{room}"),
    ),
    Intent(
        "fan",
        "set",
        "level",
        ("set the fan{room} to level {value}", "run the fan at {value}{room}", "put the fan{room} on speed {value}"),
    ),
    Intent(
        "fan",
        "off",
        None,
        ("turn off the fan{room}", "stop the fan{room}", "switch the fan off{room}"),
        ("the fan is too loud{room}",),
    ),
    Intent(
        "speaker",
        "play",
        "music",
        ("play {value}{room}", "put on {value}{room}", "start {value} on the speaker{room}"),
        ("I'd love to hear {value}{room}",),
    ),
    Intent(
        "speaker",
        "set",
        "percent",
        ("set the volume{room} to {value}", "turn the speaker{room} to {value}", "make the music {value} loud{room}"),
    ),
    Intent(
        "speaker",
        "stop",
        None,
        ("stop the music{room}", "turn off the speaker{room}", "be quiet{room}"),
        ("no more music{room}", "silence{room}"),
    ),
    Intent(
        "oven",
        "set",
        "oven",
        ("set the oven to {value}", "heat the oven to {value}", "bring the oven to {value}"),
        ("the oven should be at {value}",),
    ),
    Intent("oven", "off", None, ("turn off the oven", "switch the oven off"), ("the cake is done", "no more baking")),
    Intent(
        "door",
        "lock",
        None,
        ("lock the door{room}", "bolt the door{room}", "make sure nobody comes in{room}"),
    ),
    Intent("door", "unlock", None, ("unlock the door{room}", "let me in{room}", "open the lock{room}")),
    Intent(
        "door",
        "check",
        None,
        ("tell me if the door{room} is locked", "check the door{room}", "see whether the door is shut{room}"),
        ("is the door{room} locked?", "did I lock the door{room}?"),
    ),
    Intent(
        "vacuum",
        "start",
        None,
        ("vacuum the floor{room}", "start the vacuum{room}", "clean the carpet{room}"),
        ("the floor is dirty{room}", "there is dust everywhere{room}"),
    ),
    Intent(
        "sprinkler",
        "start",
        "minutes",
        ("water the lawn for {value}", "run the sprinkler for {value}", "sprinkle for {value}"),
        ("the plants outside need {value} of water",),
    ),
)


@dataclass(frozen=True)
class Words:
    """What one of the two files may draw from."""

    rooms: tuple[str, ...]
    openings: tuple[str, ...]
    colours: tuple[str, ...]
    music: tuple[str, ...]


TRAINING = Words(ROOMS, OPENINGS, COLOURS, MUSIC)
# Half known, half new: validation measures both what was seen and what was not.
VALIDATION = Words(
    ROOMS + VALIDATION_ROOMS * 4,
    OPENINGS + VALIDATION_OPENINGS,
    COLOURS + VALIDATION_COLOURS * 3,
    MUSIC + VALIDATION_MUSIC * 3,
)


def say_value(kind: str, words: Words, rng: random.Random) -> tuple[str, int | str]:
    """How a value is said, and what it is in JSON."""
    if kind == "percent":
        if rng.random() < 0.15:
            said = rng.choice(list(NUMBER_WORDS))
            return said, NUMBER_WORDS[said]
        number = rng.randint(1, 99)
        return f"{number} {rng.choice(('percent', 'percent', '%'))}".replace(" %", "%"), number
    if kind == "degrees":
        number = rng.randint(14, 27)
        return f"{number} degrees", number
    if kind == "oven":
        number = rng.randint(24, 50) * 5
        return f"{number} degrees", number
    if kind == "level":
        number = rng.randint(1, 9)
        return str(number), number
    if kind == "minutes":
        number = rng.randint(2, 59)
        return f"{number} minutes", number
    said = rng.choice(words.colours if kind == "colour" else words.music)
    return said, said


def make_row(intent: Intent, words: Words, rng: random.Random) -> tuple[str, str]:
    """One request and its answer."""
    remark = bool(intent.remarks) and rng.random() < 0.25
    text = rng.choice(intent.remarks if remark else intent.commands)
    room = rng.choice(words.rooms) if "{room}" in text and rng.random() < 0.7 else None
    said, value = say_value(intent.value, words, rng) if intent.value else ("", None)
    text = text.format(room=f" in the {room}" if room else "", value=said)
    if not remark:
        text = rng.choice(words.openings) + text + rng.choice(ENDINGS)
        if text.startswith(("could", "can", "would")):
            text += "?"
    if rng.random() < 0.5:
        text = text[0].upper() + text[1:]
        text += "" if text.endswith("?") else "."
    answer = {"device": intent.device, "room": room, "action": intent.action, "value": value}
    return text, json.dumps(answer)


def make_rows(count: int, words: Words, taken: set[str], rng: random.Random) -> list[dict[str, list[dict[str, str]]]]:
    """Rows in turn over all intents, then shuffled; a request that was written before is drawn again."""
    rows: list[dict[str, list[dict[str, str]]]] = []
    while len(rows) < count:
        text, answer = make_row(INTENTS[len(rows) % len(INTENTS)], words, rng)
        plain = text.lower().strip(" .?")
        if plain in taken:
            continue
        taken.add(plain)
        contents = (("system", SYSTEM), ("user", text), ("assistant", answer))
        rows.append({"messages": [{"role": role, "content": content} for role, content in contents]})
    rng.shuffle(rows)
    return rows


def main() -> None:
    """Writes both files beside this one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    parser.add_argument("--training", type=int, default=360)
    parser.add_argument("--validation", type=int, default=60)
    parser.add_argument("--seed", type=int, default=20)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    taken: set[str] = set()
    for name, count, words in (("train", options.training, TRAINING), ("validation", options.validation, VALIDATION)):
        rows = make_rows(count, words, taken, rng)
        path = options.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
