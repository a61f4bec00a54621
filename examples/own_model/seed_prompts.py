"""Seed dialogues for the example: what users of a booking assistant might say, composed from templates.

    python examples/own_model/seed_prompts.py --count 300 --seed 0 --out seeds.jsonl

Only the users' words are there: `medusa distill` lets the model answer them. For a model of your own use what
its users really say.
"""

import argparse
import json
import random
import re
from pathlib import Path

Choices = dict[str, tuple[str, ...]]

WORDS: Choices = {
    "city": (
        "San Francisco",
        "Oakland",
        "San Jose",
        "New York",
        "Los Angeles",
        "Seattle",
        "Chicago",
        "London",
    ),
    "station": ("Cambridge", "Norwich", "Ely", "Peterborough", "Leicester", "Stansted airport"),
    "food": ("Italian", "Chinese", "Indian", "Mexican", "Thai", "French", "Japanese", "vegetarian"),
    "price": ("cheap", "moderately priced", "expensive", "good", "nice"),
    "area": ("centre", "north", "south", "east", "west"),
    "day": ("today", "tomorrow", "on Monday", "on Friday", "on Saturday", "next Sunday", "on March 8th"),
    "time": ("at noon", "at 6 pm", "at half past seven", "at 11:30 am", "in the evening", "at 17:45"),
    "people": ("two", "three", "four", "five", "six"),
    "nights": ("one night", "two nights", "three nights", "five nights"),
    "film": ("comedy", "drama", "horror film", "action film", "thriller", "love story"),
    "place": ("museum", "park", "theatre", "swimming pool", "college", "nightclub"),
    "music": ("pop", "rock", "jazz", "country", "reggae", "electronic"),
    "doctor": ("dentist", "general practitioner", "dermatologist", "eye doctor", "psychologist"),
    "event": ("concert", "baseball game", "football game", "theatre play", "art exhibition"),
    "car": ("compact car", "hatchback", "standard car", "SUV"),
    "name": ("Anna", "Mr. Brown", "Maria", "Peter", "my sister", "my landlord"),
    "amount": ("50 dollars", "120 dollars", "300 dollars", "one thousand dollars"),
}

# Each line: what is wanted, what is added when the assistant asks back, how it ends.
DIALOGUES: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "I am looking for a {price} {food} restaurant in the {area} of town.",
            "Can you find me somewhere to eat {food} food in {city}?",
            "Which {price} restaurants are there in {city}?",
            "We would like to have dinner {day}, something {food}.",
        ),
        (
            "Please book a table for {people} people {day} {time}.",
            "The {area} would be best, and it should not be too loud.",
            "What is the address, and what is the phone number?",
            "Is it {price}? And do they have live music?",
        ),
        ("That sounds good, please book it.", "Thank you, that is all I need.", "Is there another one?"),
    ),
    (
        (
            "I need a {price} hotel in the {area} with free parking.",
            "Find me a place to stay in {city} for {nights}.",
            "Is there a guesthouse with wifi in the {area} of town?",
            "I want to book a hotel room in {city} {day}.",
        ),
        (
            "It is for {people} people and {nights}, starting {day}.",
            "Does it have internet, and how many stars has it got?",
            "The price does not matter, but parking does.",
        ),
        ("Yes, please make the reservation.", "Could I have the reference number?", "Thanks, goodbye."),
    ),
    (
        (
            "I need a train from {station} to London {day}.",
            "When does the next train to {station} leave?",
            "I want to take a bus from {city} to {city} {day}.",
            "Could you look for a flight from {city} to {city}?",
        ),
        (
            "I would like to arrive {time}.",
            "For {people} people, please. How long does the journey take?",
            "How much is a ticket?",
        ),
        ("Please buy the tickets.", "That works for me, thank you.", "Is there an earlier one?"),
    ),
    (
        (
            "What films are on in {city} {day}?",
            "I would like to see a {film} at the cinema {day}.",
            "Can you recommend a {film} to watch at home?",
            "Are there tickets for a {event} in {city}?",
        ),
        (
            "I need {people} tickets for {day}.",
            "Who plays in it?",
            "Something else, please: a {film}, perhaps.",
            "Where is it, and when does it start?",
        ),
        ("Great, please get the tickets.", "No, that is everything. Thanks!", "Which one is the best?"),
    ),
    (
        (
            "What will the weather be like in {city} {day}?",
            "Will it rain in {city} {day}?",
            "How hot will it get {day} in {city}?",
        ),
        ("And how strong is the wind?", "What about {city}?", "How humid will it be?"),
        ("Thank you very much.", "Good. What can I do there {day}?", "Thanks, that is all."),
    ),
    (
        (
            "Which {place} can I visit in the {area} of town?",
            "I want to see a {place} in {city}.",
            "When does the {place} open {day}?",
        ),
        ("What are the opening hours?", "Is the entrance free?", "Can you give me the postcode?"),
        ("Please book a taxi to it {time}.", "Thanks, I will go there.", "Is there anything else nearby?"),
    ),
    (
        (
            "Find me a {doctor} in {city}.",
            "I need an appointment with a {doctor} {day}.",
            "Is there a good hair salon in {city}?",
        ),
        ("{day} {time} would suit me.", "Where are they, and what is their number?", "Any other?"),
        ("Yes, please make the appointment.", "Thank you for your help.", "No, leave it."),
    ),
    (
        (
            "I want to rent a {car} in {city} {day}.",
            "I need a taxi to the {place} {time}.",
            "Get me a ride to {station} for {people} people.",
        ),
        ("I will pick it up {time}.", "For {people} days, please.", "A {car} is fine. What does it cost?"),
        ("Please confirm it.", "Thanks, bye.", "Can I cancel it later?"),
    ),
    (
        (
            "Please transfer {amount} to {name}.",
            "What is the balance of my savings account?",
            "I want to send {amount} to {name} from my checking account.",
        ),
        ("No, make it {amount}.", "From my savings account, please.", "How much is left then?"),
        ("Yes, that is right.", "Thank you, that is it.", "When will it arrive?"),
    ),
    (
        (
            "Play me some {music} music.",
            "I want to listen to a {music} song from last year.",
            "Find a new apartment with {people} rooms in {city}.",
        ),
        ("On the speaker in the kitchen, please.", "Something newer, perhaps?", "What else is there?"),
        ("Yes, go on.", "Thanks a lot!", "That will be all."),
    ),
)


def compose(chooser: random.Random) -> list[str]:
    """What one user says: two or three turns."""
    turns = [chooser.choice(part) for part in chooser.choice(DIALOGUES)]
    if chooser.random() < 0.4:
        del turns[1]
    return [_fill(turn, chooser) for turn in turns]


def write_seeds(path: Path, count: int, seed: int) -> None:
    """`count` different dialogues, a JSON object with `messages` a line."""
    chooser = random.Random(seed)
    lines: dict[str, None] = {}
    while len(lines) < count:
        messages = [{"role": "user", "content": text} for text in compose(chooser)]
        between = {"role": "assistant", "content": ""}  # where the model's answer goes
        turns = [message for user in messages for message in (user, between)]
        lines[json.dumps({"messages": turns})] = None
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def _fill(template: str, chooser: random.Random) -> str:
    parts = template.split("{")
    text = parts[0]
    for part in parts[1:]:
        name, _, rest = part.partition("}")
        text += chooser.choice(WORDS[name]) + rest
    text = re.sub(r"\b([Aa]) (?=[aeioAEIO])", r"\1n ", text)  # an action film
    return text[0].upper() + text[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    write_seeds(args.out, args.count, args.seed)


if __name__ == "__main__":
    main()
