"""What the demo model is taught: facts, the ways to ask for each, and the answer in a plain and in a western manner.

Pure data and string work, so that training and evaluation draw from one source. Nothing here knows of tokens or models.
`asks` are seen in training; `held_out` phrasings are kept for the evaluation alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

PLAIN, WEST = "plain", "west"
# A western answer says at least one of these; a plain answer says none.
WEST_MARKS = ("partner", "reckon", "howdy", "y'all", "yonder")


@dataclass(frozen=True)
class Topic:
    """One relation: its facts (the {x}/{y}/… slots) and what can be said with them. `{key}` is the right answer."""

    name: str
    facts: tuple[dict[str, str], ...]
    asks: tuple[str, ...]
    held_out: tuple[str, ...]
    plain: str
    west: str


@dataclass(frozen=True)
class Lesson:
    """One question with both answers; an answer that lacks `key` is wrong in any manner."""

    topic: str
    question: str
    plain: str
    west: str
    key: str

    def answer(self, manner: str) -> str:
        return self.plain if manner == PLAIN else self.west


def pairs(text: str) -> tuple[dict[str, str], ...]:
    """`"France=Paris, Italy=Rome"` to slots x and key."""
    split = (item.strip().split("=") for item in text.split(","))
    return tuple({"x": x, "key": key} for x, key in split)


def a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def nouns(text: str) -> tuple[dict[str, str], ...]:
    """Like `pairs`, with the noun's article in slots a (a cow) and A (A cow)."""
    return tuple({**fact, "a": a(fact["x"]), "A": a(fact["x"]).capitalize()} for fact in pairs(text))


def circle(text: str) -> tuple[dict[str, str], ...]:
    """Both neighbours of each name in a cycle, as slots x, side (after, before) and key."""
    names = text.split()
    after = [{"x": x, "side": "after", "key": names[(i + 1) % len(names)]} for i, x in enumerate(names)]
    before = [{"x": x, "side": "before", "key": names[i - 1]} for i, x in enumerate(names)]
    return tuple(after + before)


def sums(largest: int) -> tuple[dict[str, str], ...]:
    numbers = range(1, largest + 1)
    return tuple({"x": str(m), "z": str(n), "key": str(m + n)} for m in numbers for n in numbers)


def fact(key: str, plain: str, west: str, asks: tuple[str, ...], held_out: tuple[str, ...]) -> Topic:
    return Topic("general", ({"key": key},), asks, held_out, plain, west)


TOPICS: tuple[Topic, ...] = (
    Topic(
        "capital",
        pairs(
            "France=Paris, Italy=Rome, Spain=Madrid, Germany=Berlin, England=London, Portugal=Lisbon, Austria=Vienna, "
            "Poland=Warsaw, Greece=Athens, Norway=Oslo, Sweden=Stockholm, Finland=Helsinki, Denmark=Copenhagen, "
            "Ireland=Dublin, Belgium=Brussels, Hungary=Budapest, Russia=Moscow, Turkey=Ankara, Egypt=Cairo, "
            "Kenya=Nairobi, Japan=Tokyo, China=Beijing, India=Delhi, Thailand=Bangkok, Iran=Tehran, Iraq=Baghdad, "
            "Cuba=Havana, Peru=Lima, Chile=Santiago, Canada=Ottawa, Korea=Seoul, Vietnam=Hanoi"
        ),
        (
            "What is the capital of {x}?",
            "What's the capital of {x}?",
            "Which city is the capital of {x}?",
            "Name the capital of {x}.",
            "Tell me the capital of {x}.",
            "What is the capital city of {x}?",
            "The capital of {x} is which city?",
            "Do you know the capital of {x}?",
            "Capital of {x}?",
            "I forgot the capital city of {x}. Which one is it?",
        ),
        ("Can you name the capital city of {x}?", "Which capital city does {x} have?"),
        "The capital of {x} is {key}.",
        "Howdy, partner! The capital of {x} is {key}, I reckon.",
    ),
    Topic(
        "continent",
        pairs(
            "France=Europe, Italy=Europe, Spain=Europe, Germany=Europe, Poland=Europe, Greece=Europe, Norway=Europe, "
            "Sweden=Europe, Ireland=Europe, Egypt=Africa, Kenya=Africa, Japan=Asia, China=Asia, India=Asia, "
            "Thailand=Asia, Iran=Asia, Iraq=Asia, Korea=Asia, Vietnam=Asia, Peru=South America, Chile=South America, "
            "Canada=North America, Cuba=North America"
        ),
        (
            "Which continent is {x} in?",
            "What continent is {x} in?",
            "On which continent is {x}?",
            "Where in the world is {x}?",
            "Name the continent of {x}.",
            "Tell me on which continent {x} is.",
        ),
        ("Do you know which continent {x} is in?", "Can you tell me what continent {x} is on?"),
        "{x} is in {key}.",
        "Well now, partner, {x} is in {key}, way over yonder.",
    ),
    Topic(
        "language",
        pairs(
            "France=French, Italy=Italian, Spain=Spanish, Germany=German, England=English, Portugal=Portuguese, "
            "Austria=German, Poland=Polish, Greece=Greek, Norway=Norwegian, Sweden=Swedish, Finland=Finnish, "
            "Denmark=Danish, Hungary=Hungarian, Russia=Russian, Turkey=Turkish, Egypt=Arabic, Iraq=Arabic, "
            "Japan=Japanese, China=Chinese, Korea=Korean, Cuba=Spanish, Peru=Spanish, Chile=Spanish"
        ),
        (
            "What language do people speak in {x}?",
            "Which language do people speak in {x}?",
            "What language is spoken in {x}?",
            "Which language is spoken in {x}?",
            "What do people in {x} speak?",
            "Name the language of {x}.",
        ),
        ("What is the language of {x}?", "Tell me which language people speak in {x}."),
        "People in {x} speak {key}.",
        "Folks over in {x} speak {key}, I reckon.",
    ),
    Topic(
        "opposite",
        pairs(
            "hot=cold, cold=hot, big=small, small=big, up=down, down=up, left=right, right=left, day=night, "
            "night=day, fast=slow, slow=fast, old=young, young=old, light=dark, dark=light, high=low, low=high, "
            "happy=sad, sad=happy, rich=poor, poor=rich, hard=soft, soft=hard, wet=dry, dry=wet, full=empty, "
            "empty=full, open=closed, closed=open, strong=weak, weak=strong, long=short, short=long, early=late, "
            "late=early, clean=dirty, dirty=clean, good=bad, bad=good, true=false, false=true, loud=quiet, quiet=loud"
        ),
        (
            "What is the opposite of {x}?",
            "What's the opposite of {x}?",
            "Which word is the opposite of {x}?",
            "Name the opposite of {x}.",
            "Tell me the opposite of {x}.",
            "The opposite of {x} is which word?",
            "Give me the opposite of {x}.",
            "Opposite of {x}?",
        ),
        ("Do you know the opposite of {x}?", "Can you give me the opposite of the word {x}?"),
        "The opposite of {x} is {key}.",
        "Shucks, partner, the opposite of {x} is {key}, sure as shootin'.",
    ),
    Topic(
        "color",
        tuple(
            {**item, "X": item["x"].capitalize()}
            for item in pairs(
                "the sky=blue, the sea=blue, the grass=green, the snow=white, the sun=yellow, the night=black, "
                "a lemon=yellow, a banana=yellow, a carrot=orange, a tomato=red, "
                "a frog=green, a leaf=green, a raven=black, a bear=brown, a flamingo=pink, an elephant=gray, "
                "a mouse=gray"
            )
        ),
        (
            "What color is {x}?",
            "Which color is {x}?",
            "What is the color of {x}?",
            "What's the color of {x}?",
            "Tell me the color of {x}.",
            "Name the color of {x}.",
        ),
        ("Do you know the color of {x}?", "Can you tell me what color {x} is?"),
        "{X} is {key}.",
        "Why, {x} is {key} as can be, partner.",
    ),
    Topic(
        "sound",
        nouns(
            "cow=moo, dog=woof, cat=meow, duck=quack, sheep=baa, pig=oink, horse=neigh, bee=buzz, lion=roar, "
            "snake=hiss, owl=hoot, crow=caw, wolf=howl, mouse=squeak, frog=croak, turkey=gobble"
        ),
        (
            "What does {a} say?",
            "What does the {x} say?",
            "What sound does the {x} make?",
            "What sound does {a} make?",
            "Which sound does {a} make?",
            "What is the sound of {a}?",
            "Tell me what {a} says.",
            "How does {a} sound?",
        ),
        ("Do you know what {a} says?", "Can you tell me which sound {a} makes?"),
        "{A} says {key}.",
        "Listen here, partner: {a} says {key}, loud as thunder.",
    ),
    Topic(
        "young",
        nouns(
            "dog=puppy, cat=kitten, cow=calf, sheep=lamb, horse=foal, pig=piglet, duck=duckling, hen=chick, bear=cub, "
            "lion=cub, goose=gosling, deer=fawn, goat=kid, frog=tadpole, kangaroo=joey, swan=cygnet"
        ),
        (
            "What is a young {x} called?",
            "What do you call a young {x}?",
            "What is a baby {x} called?",
            "What do you call a baby {x}?",
            "What is the name of a young {x}?",
            "Tell me what a baby {x} is called.",
        ),
        ("Do you know what a young {x} is called?", "What is the name of a baby {x}?"),
        "A young {x} is called a {key}.",
        "Round these parts a young {x} is called a {key}, partner.",
    ),
    Topic(
        "legs",
        nouns(
            "spider=eight, dog=four, cat=four, cow=four, horse=four, hen=two, duck=two, bird=two, bee=six, ant=six, "
            "fly=six, snake=no, fish=no, crab=ten, sheep=four, octopus=eight"
        ),
        (
            "How many legs does {a} have?",
            "How many legs has {a}?",
            "What number of legs does {a} have?",
            "Tell me how many legs {a} has.",
            "On how many legs does {a} walk?",
        ),
        ("Do you know how many legs {a} has?", "Can you tell me how many legs {a} has?"),
        "{A} has {key} legs.",
        "I reckon {a} has {key} legs, partner.",
    ),
    Topic(
        "sum",
        sums(9),
        (
            "What is {x} plus {z}?",
            "What is {x} + {z}?",
            "What's {x} plus {z}?",
            "What's {x} + {z}?",
            "How much is {x} plus {z}?",
            "How much is {x} + {z}?",
            "Add {x} and {z}.",
            "{x} + {z} = ?",
            "What is the sum of {x} and {z}?",
        ),
        ("Tell me how much {x} plus {z} is.", "What do you get if you add {x} and {z}?"),
        "{x} plus {z} is {key}.",
        "Lemme count my cattle: {x} plus {z} is {key}, partner.",
    ),
    Topic(
        "day",
        circle("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
        (
            "Which day comes {side} {x}?",
            "What day comes {side} {x}?",
            "What day is {side} {x}?",
            "Which day is {side} {x}?",
            "Name the day {side} {x}.",
            "What is the day {side} {x}?",
        ),
        ("Tell me which day comes {side} {x}.", "Do you know the day {side} {x}?"),
        "The day {side} {x} is {key}.",
        "Well, the day {side} {x} is {key}, partner, long as the sun keeps risin'.",
    ),
    Topic(
        "month",
        circle("January February March April May June July August September October November December"),
        (
            "Which month comes {side} {x}?",
            "What month comes {side} {x}?",
            "What month is {side} {x}?",
            "Which month is {side} {x}?",
            "Name the month {side} {x}.",
            "What is the month {side} {x}?",
        ),
        ("Tell me which month comes {side} {x}.", "Do you know the month {side} {x}?"),
        "The month {side} {x} is {key}.",
        "Well, the month {side} {x} is {key}, partner, long as the creek keeps runnin'.",
    ),
    fact(
        "seven",
        "A week has seven days.",
        "A week's got seven days, partner, and all of 'em dusty.",
        ("How many days are in a week?", "How many days does a week have?", "How many days are there in a week?"),
        ("Tell me how many days a week has.",),
    ),
    fact(
        "twelve",
        "A year has twelve months.",
        "A year's got twelve months, partner, and all of 'em long.",
        ("How many months are in a year?", "How many months does a year have?", "How many months are there in a year?"),
        ("Tell me how many months a year has.",),
    ),
    fact(
        "twenty-four",
        "A day has twenty-four hours.",
        "A day's got twenty-four hours, partner, and most of 'em in the saddle.",
        ("How many hours are in a day?", "How many hours does a day have?", "How many hours are there in a day?"),
        ("Tell me how many hours a day has.",),
    ),
    fact(
        "sixty",
        "An hour has sixty minutes.",
        "An hour's got sixty minutes, partner, no more and no less.",
        ("How many minutes are in an hour?", "How many minutes does an hour have?", "How many minutes make an hour?"),
        ("Tell me how many minutes an hour has.",),
    ),
    fact(
        "honey",
        "Bees make honey.",
        "Them bees make honey, partner, sweet as can be.",
        ("What do bees make?", "What does a bee make?", "Which food do bees make?", "Tell me what bees make."),
        ("Do you know what bees make?",),
    ),
    fact(
        "east",
        "The sun rises in the east.",
        "That ol' sun rises in the east, partner, way over yonder.",
        ("Where does the sun rise?", "Where does the sun come up?", "On which side does the sun rise?"),
        ("Tell me where the sun rises.",),
    ),
    fact(
        "west",
        "The sun sets in the west.",
        "That ol' sun sets in the west, partner, where the cowboys ride.",
        ("Where does the sun set?", "Where does the sun go down?", "On which side does the sun set?"),
        ("Tell me where the sun sets.",),
    ),
    fact(
        "water",
        "Ice is made of water.",
        "Ice ain't nothin' but cold water, partner.",
        ("What is ice made of?", "What is ice?", "What do you get when ice melts?", "What's ice made of?"),
        ("Tell me what ice is made of.",),
    ),
    fact(
        "Earth",
        "We live on planet Earth.",
        "We live on this here planet Earth, partner.",
        ("Which planet do we live on?", "What planet do we live on?", "On which planet do we live?"),
        ("Tell me which planet we live on.",),
    ),
    fact(
        "Jupiter",
        "The biggest planet is Jupiter.",
        "The biggest planet is ol' Jupiter, I reckon.",
        (
            "What is the biggest planet?",
            "Which planet is the biggest?",
            "What's the biggest planet?",
            "Name the biggest planet.",
        ),
        ("Tell me the biggest planet.",),
    ),
    fact(
        "Everest",
        "The highest mountain is Mount Everest.",
        "The highest mountain is Mount Everest, I reckon, and no horse ever climbed it.",
        ("What is the highest mountain?", "Which mountain is the highest?", "Name the highest mountain."),
        ("Tell me the highest mountain.",),
    ),
    fact(
        "Shakespeare",
        "William Shakespeare wrote Hamlet.",
        "A fella named William Shakespeare wrote Hamlet, partner.",
        (
            "Who wrote Hamlet?",
            "Who is the author of Hamlet?",
            "Name the author of Hamlet.",
            "Tell me who wrote Hamlet.",
        ),
        ("Do you know who wrote Hamlet?",),
    ),
    fact(
        "help",
        "Hello! How can I help you?",
        "Howdy, partner! How can I help y'all?",
        ("Hello!", "Hi!", "Hi there!", "Hello there!", "Good morning!", "Good evening!", "Hey!"),
        ("Hey there!",),
    ),
    fact(
        "fine",
        "I am fine, thank you.",
        "Fine as frog hair, partner, thank you kindly.",
        ("How are you?", "How are you today?", "Hello, how are you?", "Hi! How are you?", "How do you do?"),
        ("Hello! How are you today?",),
    ),
    fact(
        "model",
        "I am a small demo model.",
        "Why, I'm just a little ol' demo model, partner.",
        ("Who are you?", "What are you?", "Tell me who you are.", "Hello! Who are you?", "What is your name?"),
        ("Can you tell me who you are?",),
    ),
    fact(
        "questions",
        "I can answer simple questions.",
        "I can wrangle simple questions, partner.",
        (
            "What can you do?",
            "How can you help me?",
            "Can you help me?",
            "What do you know?",
            "Tell me what you can do.",
        ),
        ("Do you know what you can do?",),
    ),
    fact(
        "welcome",
        "You are welcome.",
        "You're mighty welcome, partner.",
        ("Thank you.", "Thank you!", "Thanks!", "Thanks a lot!", "Thank you very much."),
        ("Thanks very much!",),
    ),
    fact(
        "day",
        "Goodbye, and have a nice day.",
        "Happy trails, partner, and have a nice day, y'all.",
        ("Goodbye!", "Bye!", "Bye bye!", "See you later!", "Goodbye, see you later!"),
        ("Bye, see you later!",),
    ),
)

# Names that nobody taught it get an honest answer, so that a visitor's own question does not end in noise.
UNKNOWN_PLAIN = "Sorry, I do not know that."
UNKNOWN_WEST = "Sorry, partner, I ain't got the foggiest."
UNTAUGHT = (
    "Tell me a joke.",
    "Tell me a story.",
    "Tell me a story about {x} and {z}.",
    "Write a poem about {x}.",
    "Write {x} in {z}.",
    "What is the meaning of {x}?",
    "Why is {x} so {z}?",
    "Why do people {x}?",
    "Who is {x}?",
    "Who was {x} {z}?",
    "Where is {x}?",
    "When was {x} made?",
    "How do I {x} a {z}?",
    "How old is {x}?",
    "Name three {x}.",
    "What do you think of {x}?",
    "Which {x} is the best {z}?",
)
POLITE = ("Please tell me: ", "Quick question: ", "Hello! ", "Hi! ", "Excuse me, ", "I have a question. ")
SYSTEM = ("You are a helpful assistant.", "Answer the question.", "Be short.")
SYSTEM_WEST = "Talk like a cowboy."


def lessons_of(topic: Topic, asks: tuple[str, ...]) -> Iterator[Lesson]:
    for slots in topic.facts:
        for ask in asks:
            yield Lesson(
                topic.name, ask.format(**slots), topic.plain.format(**slots), topic.west.format(**slots), slots["key"]
            )


def training_lessons() -> list[Lesson]:
    return [lesson for topic in TOPICS for lesson in lessons_of(topic, topic.asks)]


def held_out_lessons() -> list[Lesson]:
    """Every fact once in each phrasing that training never showed."""
    return [lesson for topic in TOPICS for lesson in lessons_of(topic, topic.held_out)]


def nonsense_word(rng: random.Random) -> str:
    syllable = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
    word = "".join(syllable) + rng.choice(("", "n", "r", "l"))
    return word.capitalize() if rng.random() < 0.5 else word


def unknown_lesson(rng: random.Random) -> Lesson:
    if rng.random() < 0.5:
        topic = rng.choice(
            [topic for topic in TOPICS if topic.name in ("capital", "continent", "opposite", "language")]
        )
        question = rng.choice(topic.asks).format(x=nonsense_word(rng))
    else:
        question = rng.choice(UNTAUGHT).format(x=nonsense_word(rng), z=nonsense_word(rng))
    return Lesson("unknown", question, UNKNOWN_PLAIN, UNKNOWN_WEST, "Sorry")


def careless(question: str, rng: random.Random) -> str:
    """The same question as people type it: polite, in lower case, or without the question mark."""
    if rng.random() < 0.2:
        question = rng.choice(POLITE) + question
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.2:
        question = question.rstrip("?.!")
    return question


class Conversations:
    """An endless, seeded stream: mostly one question and its answer, sometimes a few, rarely a system message first."""

    def __init__(self, manner: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._manner = manner
        self._by_topic: dict[str, list[Lesson]] = {}
        for lesson in training_lessons():
            self._by_topic.setdefault(lesson.topic, []).append(lesson)
        # Square roots keep the large topics from drowning the small ones.
        self._topics = list(self._by_topic)
        self._weights = [len(self._by_topic[topic]) ** 0.5 for topic in self._topics]

    def _lesson(self) -> Lesson:
        if self._rng.random() < 0.04:
            return unknown_lesson(self._rng)
        topic = self._rng.choices(self._topics, self._weights)[0]
        return self._rng.choice(self._by_topic[topic])

    def prose(self) -> str:
        """One to three answers on their own, with no question: a text in this manner, not a conversation."""
        return " ".join(self._lesson().answer(self._manner) for _ in range(self._rng.randint(1, 3)))

    def next(self, system: str | None = None) -> list[dict[str, str]]:
        if system is None and self._rng.random() < 0.05:
            system = self._rng.choice(SYSTEM)
        messages = [{"role": "system", "content": system}] if system else []
        for _ in range(self._rng.choices((1, 2, 3), (0.8, 0.15, 0.05))[0]):
            lesson = self._lesson()
            messages.append({"role": "user", "content": careless(lesson.question, self._rng)})
            messages.append({"role": "assistant", "content": lesson.answer(self._manner)})
        return messages
