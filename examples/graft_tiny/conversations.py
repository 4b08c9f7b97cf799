"""Made-up conversations for pretraining: what the documents cannot teach.

Documentation teaches a small model English and code. It does not teach that an assistant's turn is short and ends,
that an answer's words are often words of the question, or what JSON made from a sentence looks like. These seeded
generators do, on general subjects; the task of `examples/data` is not among them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

Message = dict[str, str]
Turn = tuple[str | None, str, str]  # system prompt or None, the user's words, the answer


def words(text: str, separator: str | None = None) -> list[str]:
    """A list of words, written as one runs them off."""
    return text.split(separator)


NAMES = words(
    "Ada Ben Clara Daniel Emma Felix Grace Hugo Ines Jonas Kate Leo Mara Nils Olga Paul Rosa Sam Tara Uma Victor "
    "Wanda Yusuf Zoe Amir Bella Carlos Dora Elif Frank Greta Hana Ivan Jana Karim Lena Milo Nora Oscar Petra"
)
CITIES = words(
    "Berlin Paris London Rome Madrid Vienna Oslo Lisbon Prague Dublin Athens Boston Chicago Denver Lima Tokyo Osaka "
    "Cairo Delhi Sydney Toronto Geneva Hamburg Krakow Porto Seville Bergen"
)
COLOURS = words("red blue green yellow black white brown grey orange purple pink golden silver")
ANIMALS = words("cat dog horse rabbit parrot goldfish hamster pony donkey goat sheep duck hen turtle mouse")
FOODS = words(
    "bread rice soup salad cheese apples pears carrots potatoes tomatoes eggs butter honey noodles beans onions "
    "cake biscuits lemons plums milk tea coffee juice"
)
PLACES = words(
    "kitchen,bathroom,bedroom,hall,cellar,attic,garage,garden,office,study,nursery,pantry,workshop,balcony,porch,"
    "dining room,living room,guest room,laundry room,playroom,terrace,shed,corridor,stairs,library",
    ",",
)
THINGS = words(
    "lamp light chair table sofa bed desk shelf mirror carpet curtain blind window door lock key kettle oven fridge "
    "freezer dishwasher toaster heater radiator thermostat fan vacuum radio television speaker camera alarm clock "
    "phone laptop printer book pen cup plate knife spoon bottle towel pillow blanket coat umbrella bicycle ladder "
    "hammer bucket broom candle plant vase picture box basket bag suitcase sprinkler projector boiler bulb switch"
)
ADJECTIVES = words(
    "old new small large warm cold bright dark quiet loud clean dirty heavy light soft hard wet dry empty full broken "
    "cheap pretty round narrow wide tall short comfortable dim low high open closed"
)
PEOPLE = words(
    "my brother,my sister,our neighbour,the teacher,the gardener,the cook,the nurse,the plumber,the children,"
    "the guests,my grandmother,the driver,the baker,the painter,everyone,nobody,the boy next door",
    ",",
)
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = words("January February March April May June July August September October November December")
VERBS_PAST = words(
    "bought sold cleaned moved painted repaired found lost carried opened closed borrowed hid washed dropped kept "
    "switched turned forgot wanted liked locked unlocked started stopped lowered raised covered"
)
NUMBER_WORDS = words(
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
JOBS = words("baker nurse teacher painter farmer pilot lawyer singer tailor waiter dentist engineer plumber driver")
LANGUAGES = words("Spanish German French English Polish Arabic Hindi Greek Italian Dutch Turkish Swedish")

CALM_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a careful assistant. Keep answers short.",
    "Answer in one line.",
    "Answer exactly and briefly.",
    "You follow instructions to the letter.",
)


@dataclass
class Knowledge:
    """What was read out of the documents, for the generators to ask about."""

    glosses: list[tuple[str, str, str]] = field(default_factory=list)  # word, part of speech, meaning
    examples: list[tuple[str, str]] = field(default_factory=list)  # word, a sentence with it
    kinds: list[tuple[str, str]] = field(default_factory=list)  # word, the more general word
    synonyms: list[tuple[str, list[str]]] = field(default_factory=list)
    functions: list[tuple[str, list[str], str]] = field(default_factory=list)  # dotted name, arguments, first sentence
    words: list[str] = field(default_factory=list)  # plain lower-case words, for copying


class Writer:
    """Draws conversations; everything random comes from one seeded generator."""

    def __init__(self, knowledge: Knowledge, rng: random.Random) -> None:
        self.k = knowledge
        self.rng = rng
        self.tasks: list[tuple[Callable[[], Turn], float]] = [
            (self._define, 2.0),
            (self._which_word, 0.5),
            (self._sentence_with, 1.5),
            (self._kind_of, 1.0),
            (self._synonyms, 0.7),
            (self._what_does, 2.0),
            (self._arguments, 1.5),
            (self._module_of, 0.5),
            (self._repeat, 2.0),
            (self._change_case, 1.0),
            (self._nth_word, 1.0),
            (self._reverse, 0.7),
            (self._listing, 1.0),
            (self._replace, 1.0),
            (self._count, 0.5),
            (self._contains, 0.5),
            (self._pick, 1.5),
            (self._json_from_pairs, 2.0),
            (self._json_from_sentence, 5.0),
            (self._json_array, 1.0),
            (self._json_lookup, 1.0),
            (self._extract, 2.0),
            (self._number_word, 1.0),
            (self._label, 1.0),
        ]

    # -- small pieces -------------------------------------------------------------------------------------------

    def _one(self, *choices: str) -> str:
        return self.rng.choice(choices)

    def _phrase(self, least: int = 2, most: int = 9) -> str:
        """Words in a row: real sentences sometimes, unrelated words otherwise, so that copying cannot be guessed."""
        if self.rng.random() < 0.4:
            return self.everyday()
        words = self.rng.choices(self.k.words, k=self.rng.randint(least, most))
        if self.rng.random() < 0.3:
            words[self.rng.randrange(len(words))] = str(self.rng.randint(0, 999))
        return " ".join(words)

    def _noun(self) -> str:
        return self.rng.choice(self.rng.choice((THINGS, THINGS, ANIMALS, FOODS)))

    def everyday(self) -> str:
        """One plain sentence about a house, a person, a day."""
        r = self.rng
        who, thing, other = r.choice(PEOPLE), r.choice(THINGS), r.choice(THINGS)
        adjective, place, verb = r.choice(ADJECTIVES), r.choice(PLACES), r.choice(VERBS_PAST)
        name, city, food, animal = r.choice(NAMES), r.choice(CITIES), r.choice(FOODS), r.choice(ANIMALS)
        number, hour = r.randint(2, 99), f"{r.randint(0, 23)}:{r.choice(('00', '15', '30', '45'))}"
        pattern = r.randrange(24)
        forms = (
            f"The {thing} in the {place} is {adjective}.",
            f"{who.capitalize()} {verb} the {adjective} {thing}.",
            f"There is a {adjective} {thing} next to the {other}.",
            f"{name} {verb} {number} {food} in {city}.",
            f"Please bring the {thing} to the {place}.",
            f"Could you tell me where the {thing} is?",
            f"On {r.choice(DAYS)} {who} {verb} a {thing} and a {other}.",
            f"The {animal} sleeps under the {thing} in the {place}.",
            f"{name} comes home at {hour} and goes to the {place}.",
            f"It is {number} degrees in the {place} today.",
            f"I would like some {food} and {r.choice(FOODS)}, please.",
            f"We have {number} {r.choice(COLOURS)} boxes in the {place}.",
            f"Is the {thing} still {adjective}, or is it {r.choice(ADJECTIVES)} now?",
            f"{name} and {r.choice(NAMES)} painted the {place} {r.choice(COLOURS)}.",
            f"The price of the {thing} fell by {number} percent in {r.choice(MONTHS)}.",
            f"Can we put the {thing} up in the {place}?",
            f"Let us go down to the {place} and look for the {thing}.",
            f"{who.capitalize()} said that the {thing} was too {adjective}.",
            f"My {thing} is {number} years old and a little {adjective}.",
            f"Don't forget the {food} on the {thing}!",
            f"How much is the {r.choice(COLOURS)} {thing} in the window?",
            f"The train to {city} leaves at {hour} from platform {number}.",
            f"Nobody knows who {verb} the {thing} from the {place}.",
            f"Half of the {food} is in the {place}, the other half is on the {other}.",
        )
        return forms[pattern]

    def story(self) -> str:
        """A few everyday sentences in a row: a document of its own."""
        return " ".join(self.everyday() for _ in range(self.rng.randint(3, 7)))

    # -- questions about the documents --------------------------------------------------------------------------

    def _define(self) -> Turn:
        word, part, meaning = self.rng.choice(self.k.glosses)
        ask = self._one(
            f"What does {word} mean?",
            f"Define {word}.",
            f'What is the meaning of "{word}"?',
            f"Explain the {part} {word}.",
            f"{word}?",
        )
        return self._one("You are a dictionary.", "Say what the word means.", *CALM_SYSTEMS), ask, meaning

    def _which_word(self) -> Turn:
        word, part, meaning = self.rng.choice(self.k.glosses)
        return None, self._one(f"Which {part} means: {meaning}?", f"Find a {part} for: {meaning}"), word

    def _sentence_with(self) -> Turn:
        word, sentence = self.rng.choice(self.k.examples)
        return (
            None,
            self._one(f"Use {word} in a sentence.", f"Give an example of {word}.", f"Example: {word}"),
            sentence,
        )

    def _kind_of(self) -> Turn:
        word, general = self.rng.choice(self.k.kinds)
        if self.rng.random() < 0.3:
            return None, f"Answer in JSON. {word} is a kind of what?", dumps({"word": word, "kind_of": general})
        return None, self._one(f"What kind of thing is {word}?", f"{word} is a kind of what?"), general

    def _synonyms(self) -> Turn:
        word, others = self.rng.choice(self.k.synonyms)
        if self.rng.random() < 0.4:
            return "Answer with a JSON array.", f"Other words for {word}", dumps(others)
        return None, self._one(f"Other words for {word}?", f"Give synonyms of {word}."), ", ".join(others)

    def _what_does(self) -> Turn:
        name, _, sentence = self.rng.choice(self.k.functions)
        ask = self._one(f"What does {name} do?", f"What is {name}?", f"Explain {name}.", f"Tell me about `{name}`.")
        return self._one("You know Python's documentation.", *CALM_SYSTEMS), ask, sentence

    def _arguments(self) -> Turn:
        name, arguments, _ = self.rng.choice(self.k.functions)
        if self.rng.random() < 0.4:
            return None, f"List the arguments of {name} as JSON.", dumps(arguments)
        said = ", ".join(arguments) if arguments else "none"
        return None, self._one(f"Give the arguments of {name}.", f"Which arguments does {name} take?"), said

    def _module_of(self) -> Turn:
        name, _, _ = self.rng.choice(self.k.functions)
        module, _, short = name.rpartition(".")
        return None, f"In {name}, which part is the last name?", short or module

    # -- copying and changing the user's own words --------------------------------------------------------------

    def _repeat(self) -> Turn:
        text = self._phrase()
        system = self._one("Repeat what the user says.", "Copy the user's text.", "Echo.")
        if self.rng.random() < 0.5:
            return system, text, text
        return None, self._one(f"Repeat: {text}", f"Say this again: {text}", f'Copy "{text}"'), text

    def _change_case(self) -> Turn:
        text = self._phrase(1, 4)
        how, changed = self.rng.choice(
            (
                ("capital letters", text.upper()),
                ("small letters", text.lower()),
                ("Title Case", text.title()),
                ("snake_case", "_".join(text.lower().rstrip(".?!").split())),
            )
        )
        return None, self._one(f"Write in {how}: {text}", f"Put this in {how}: {text}"), changed

    def _nth_word(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(3, 7))
        place = self.rng.choice(("first", "second", "third", "last"))
        found = {"first": words[0], "second": words[1], "third": words[2], "last": words[-1]}[place]
        if self.rng.random() < 0.4:
            index = self.rng.randrange(len(words) - 1)
            return None, f"Which word follows {words[index]} in: {' '.join(words)}", words[index + 1]
        return (
            None,
            self._one(f"What is the {place} word? {' '.join(words)}", f"{place} word of: {' '.join(words)}"),
            found,
        )

    def _reverse(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(2, 5))
        return None, self._one("Reverse the words: ", "Backwards: ") + " ".join(words), " ".join(reversed(words))

    def _listing(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(2, 6))
        joined = ", ".join(words)
        forms: tuple[tuple[str, str], ...] = (
            ("Make a numbered list: ", "\n".join(f"{i}. {w}" for i, w in enumerate(words, 1))),
            ("Make a bullet list: ", "\n".join(f"- {w}" for w in words)),
            ("One word a line: ", "\n".join(words)),
            ("Join with a slash: ", "/".join(words)),
        )
        ask, answer = self.rng.choice(forms)
        return None, ask + joined, answer

    def _replace(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(3, 7))
        new = self.rng.choice(self.k.words)
        index = self.rng.randrange(len(words))
        changed = [*words[:index], new, *words[index + 1 :]]
        return None, f"Replace {words[index]} with {new}: {' '.join(words)}", " ".join(changed)

    def _count(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(1, 6))
        return None, f"How many words? {' '.join(words)}", str(len(words))

    def _contains(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(3, 7))
        inside = self.rng.random() < 0.5
        asked = self.rng.choice(words) if inside else self.rng.choice(self.k.words)
        return None, f"Is the word {asked} in: {' '.join(words)}?", "yes" if asked in words else "no"

    def _pick(self) -> Turn:
        """A sentence and a question whose answer is one of its words."""
        r = self.rng
        name, thing, place, colour = r.choice(NAMES), r.choice(THINGS), r.choice(PLACES), r.choice(COLOURS)
        number, city = r.randint(2, 500), r.choice(CITIES)
        text = r.choice(
            (
                f"{name} put {number} {colour} {thing}s in the {place} in {city}.",
                f"In {city}, {name} found {number} {colour} {thing}s; they were in the {place}.",
                f"The {place} in {city} has {number} {colour} {thing}s, says {name}.",
            )
        )
        question, answer = r.choice(
            (
                ("Who?", name),
                ("How many?", str(number)),
                ("Which colour?", colour),
                ("Which city?", city),
                ("Where in the house?", place),
                ("What?", thing + "s"),
            )
        )
        return (
            None,
            self._one(f"{text} {question}", f"{question} {text}", f"Text: {text}\nQuestion: {question}"),
            answer,
        )

    # -- JSON ---------------------------------------------------------------------------------------------------

    def _json_from_pairs(self) -> Turn:
        keys = self.rng.sample(self.k.words, self.rng.randint(1, 5))
        values = [self._scalar() for _ in keys]
        record = dict(zip(keys, values, strict=True))
        shown = {
            k: ("nothing" if v is None else str(v).lower() if isinstance(v, bool) else v) for k, v in record.items()
        }
        separator = self._one("\n", ", ", "; ")
        equals = self._one(": ", " = ", " is ")
        text = separator.join(f"{k}{equals}{v}" for k, v in shown.items())
        system = self._one("Turn the text into JSON.", "Write JSON.", "Answer with one JSON object.")
        return (system, text, dumps(record)) if self.rng.random() < 0.6 else (None, f"As JSON: {text}", dumps(record))

    def _scalar(self) -> str | int | bool | None:
        r = self.rng.random()
        if r < 0.55:
            return " ".join(self.rng.sample(self.k.words, self.rng.choice((1, 1, 1, 2))))
        if r < 0.8:
            return self.rng.randint(0, 999)
        return None if r < 0.92 else self.rng.random() < 0.5

    def _json_from_sentence(self) -> Turn:
        """The fields named by the system prompt, found in a sentence; a field that is not said is null."""
        record, text = self.rng.choice(
            (self._person, self._purchase, self._trip, self._pet, self._meeting, self._lesson)
        )()
        keys = list(record)
        if self.rng.random() < 0.5:
            keys = self.rng.sample(keys, self.rng.randint(1, len(keys)))
        answer = {key: record[key] for key in keys}
        named = ", ".join(keys)
        system = self._one(
            f"Extract {named} as JSON.",
            f"Answer with JSON that has the keys {named}. Use null for what is not said.",
            f"Give a JSON object with {named}.",
            f"Fields: {named}. Write JSON only.",
        )
        return system, text, dumps(answer)

    def _maybe(self, text: str) -> tuple[str, bool]:
        said = self.rng.random() < 0.7
        return (text if said else ""), said

    def _person(self) -> tuple[dict[str, object], str]:
        r = self.rng
        name, age, city, job = r.choice(NAMES), r.randint(5, 95), r.choice(CITIES), r.choice(JOBS)
        aged, has_age = self._maybe(self._one(f", {age} years old,", f" ({age})", f", aged {age},"))
        lives, has_city = self._maybe(self._one(f" lives in {city}", f" comes from {city}", f" moved to {city}"))
        works, has_job = self._maybe(self._one(f" works as a {job}", f" is a {job}", f" wants to be a {job}"))
        parts = [part for part in (lives, works) if part] or [self._one(" says hello", " is here")]
        text = f"{name}{aged}{' and'.join(parts)}."
        return {
            "name": name,
            "age": age if has_age else None,
            "city": city if has_city else None,
            "job": job if has_job else None,
        }, text

    def _purchase(self) -> tuple[dict[str, object], str]:
        r = self.rng
        quantity, item, price, colour = r.randint(2, 60), self._noun(), r.randint(1, 900), r.choice(COLOURS)
        coloured, has_colour = self._maybe(f"{colour} ")
        priced, has_price = self._maybe(self._one(f" for {price} euros", f" at {price} dollars", f", {price} in all"))
        start = self._one("I bought", "Please order", "We need", "She sold me", "Send", "Can I have", "I'd like to get")
        return {
            "quantity": quantity,
            "item": item,
            "colour": colour if has_colour else None,
            "price": price if has_price else None,
        }, f"{start} {quantity} {coloured}{item}{priced}."

    def _trip(self) -> tuple[dict[str, object], str]:
        r = self.rng
        start, end = r.sample(CITIES, 2)
        day, hour = r.choice(DAYS), f"{r.randint(0, 23)}:{r.choice(('00', '15', '20', '30', '45'))}"
        from_, has_from = self._maybe(f" from {start}")
        when, has_day = self._maybe(f" on {day}")
        at, has_hour = self._maybe(f" at {hour}")
        how = self._one("A ticket", "The bus", "A flight", "The night train", "I must travel", "Take me", "Book a seat")
        return {
            "from": start if has_from else None,
            "to": end,
            "day": day if has_day else None,
            "time": hour if has_hour else None,
        }, f"{how}{from_} to {end}{when}{at}{self._one('', '.', ', please', ' please')}"

    def _pet(self) -> tuple[dict[str, object], str]:
        r = self.rng
        animal, name, owner, colour = r.choice(ANIMALS), r.choice(NAMES), r.choice(NAMES), r.choice(COLOURS)
        coloured, has_colour = self._maybe(f"{colour} ")
        called, has_name = self._maybe(self._one(f" called {name}", f" named {name}"))
        return {
            "animal": animal,
            "name": name if has_name else None,
            "owner": owner,
            "colour": colour if has_colour else None,
        }, self._one(
            f"{owner} has a {coloured}{animal}{called}.",
            f"A {coloured}{animal}{called} lives with {owner}.",
            f"The {coloured}{animal}{called} belongs to {owner}.",
        )

    def _meeting(self) -> tuple[dict[str, object], str]:
        r = self.rng
        who, day, month, number = r.choice(NAMES), r.choice(DAYS), r.choice(MONTHS), r.randint(1, 28)
        place = r.choice(PLACES)
        where, has_place = self._maybe(f" in the {place}")
        minutes, has_minutes = r.randint(1, 18) * 5, r.random() < 0.6
        length = f" for {minutes} minutes" if has_minutes else ""
        on_day = r.random() < 0.5
        when = f" on {day}" if on_day else f" on {number} {month}"
        start = self._one("Meet", "I see", "Lunch with", "A call with", "Remind me to meet", "Let's talk to")
        return {
            "who": who,
            "date": day if on_day else f"{number} {month}",
            "place": place if has_place else None,
            "minutes": minutes if has_minutes else None,
        }, f"{start} {who}{where}{when}{length}{self._one('', '.', '!')}"

    def _lesson(self) -> tuple[dict[str, object], str]:
        r = self.rng
        language, pupil, level, pages = r.choice(LANGUAGES), r.choice(NAMES), r.randint(1, 12), r.randint(2, 300)
        at_level, has_level = self._maybe(self._one(f" at level {level}", f" (level {level})"))
        much, has_pages = self._maybe(f" and read {pages} pages")
        return {
            "pupil": pupil,
            "language": language,
            "level": level if has_level else None,
            "pages": pages if has_pages else None,
        }, f"{pupil} {self._one('learns', 'studies', 'is learning', 'teaches herself')} {language}{at_level}{much}."

    def _json_array(self) -> Turn:
        words = self.rng.sample(self.k.words, self.rng.randint(1, 6))
        if self.rng.random() < 0.3:
            numbers = [self.rng.randint(0, 999) for _ in words]
            return None, "JSON array of: " + " ".join(map(str, numbers)), dumps(numbers)
        text = self._one(", ", " and ", " ").join(words)
        return None, self._one("JSON array of: ", "As a JSON list: ") + text, dumps(words)

    def _json_lookup(self) -> Turn:
        keys = self.rng.sample(self.k.words, self.rng.randint(2, 5))
        record = {key: self._scalar() for key in keys}
        key = self.rng.choice(keys)
        if self.rng.random() < 0.3:
            del_key = {k: v for k, v in record.items() if k != key}
            return None, f"Remove {key}: {dumps(record)}", dumps(del_key)
        return None, self._one(f"{dumps(record)} {key}?", f"What is {key} in {dumps(record)}?"), dumps(record[key])

    def _extract(self) -> Turn:
        record, text = self.rng.choice(
            (self._person, self._purchase, self._trip, self._pet, self._meeting, self._lesson)
        )()
        key = self.rng.choice(list(record))
        value = record[key]
        system = self._one(f"Give only the {key}.", f"Which {key}? Say none if it is not there.", f"Find the {key}.")
        return system, text, "none" if value is None else str(value)

    def _number_word(self) -> Turn:
        number = self.rng.randint(1, 20)
        word = NUMBER_WORDS[number - 1]
        if self.rng.random() < 0.5:
            return None, self._one(f"Write {word} in digits.", f"{word} as a number"), str(number)
        return None, self._one(f"Write {number} in words.", f"{number} as a word"), word

    def _label(self) -> Turn:
        groups = {"animal": ANIMALS, "food": FOODS, "city": CITIES, "colour": COLOURS, "job": JOBS, "day": DAYS}
        name = self.rng.choice(list(groups))
        word = self.rng.choice(groups[name])
        system = "Label the word: " + ", ".join(self.rng.sample(list(groups), len(groups))) + "."
        if self.rng.random() < 0.4:
            return system, word, dumps({"word": word, "label": name})
        return system, word, name

    # -- whole conversations ------------------------------------------------------------------------------------

    def conversation(self) -> list[Message]:
        """One to three turns; now and then a developer's or a tool's turn, so that every role's token is seen."""
        tasks, weights = zip(*self.tasks, strict=True)
        system, user, answer = self.rng.choices(tasks, weights)[0]()
        messages: list[Message] = []
        if system is None and self.rng.random() < 0.3:
            system = self.rng.choice(CALM_SYSTEMS)
        if system is not None:
            messages.append({"role": "developer" if self.rng.random() < 0.15 else "system", "content": system})
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        while system is None or system in CALM_SYSTEMS:
            if self.rng.random() > 0.25 or len(messages) > 6:
                break
            next_system, user, answer = self.rng.choices(tasks, weights)[0]()
            if next_system is not None and next_system not in CALM_SYSTEMS:
                user = f"{next_system} {user}"
            messages += [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        if self.rng.random() < 0.03:
            number, word = self.rng.randint(0, 999), self.rng.choice(self.k.words)
            messages += [
                {"role": "user", "content": f"Look up {word}."},
                {"role": "tool", "content": dumps({"word": word, "found": number})},
                {"role": "assistant", "content": f"{word}: {number}"},
            ]
        return messages


def dumps(value: object) -> str:
    """JSON as people write it: unescaped letters, one space after a colon or comma."""
    return json.dumps(value, ensure_ascii=False)
