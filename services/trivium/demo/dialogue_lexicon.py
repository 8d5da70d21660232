"""The closed vocabulary of the dialogue corpus: question wordings, units, small talk and questions out of scope.

Data only. In the wordings `{a}`, `{b}` stand for numbers, `{x}` for a day or a month, `{n}` for a quantity with its
unit and `{to}` for the unit asked for.
"""

from __future__ import annotations

from typing import NamedTuple

SYSTEM_MESSAGES: tuple[str, ...] = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You are Trivium, a small demo model.",
    "You are a friendly tutor for arithmetic.",
    "Answer in one short sentence.",
    "Be concise.",
    "You are a careful assistant who answers with short, complete sentences.",
    "You are a calculator.",
    "You help people with numbers, dates and units.",
    "Answer the question of the user.",
)

ADD_WORDINGS: tuple[str, ...] = (
    "What is {a} plus {b}?", "What is {a} + {b}?", "How much is {a} plus {b}?", "{a} plus {b}?", "{a} + {b}",
    "{a} + {b} = ?", "Calculate {a} + {b}.", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
    "Can you tell me what {a} plus {b} is?", "What's {a}+{b}?", "What do you get when you add {a} and {b}?",
    "Compute {a} plus {b}.", "What does {a} plus {b} make?",
)  # fmt: skip
SUBTRACT_WORDINGS: tuple[str, ...] = (
    "What is {a} minus {b}?", "What is {a} - {b}?", "How much is {a} minus {b}?", "{a} minus {b}?", "{a} - {b}",
    "{a} - {b} = ?", "Calculate {a} - {b}.", "Subtract {b} from {a}.", "Take {b} away from {a}.",
    "Can you tell me what {a} minus {b} is?", "What's {a}-{b}?", "What is left when you take {b} from {a}?",
    "Compute {a} minus {b}.",
)  # fmt: skip
MULTIPLY_WORDINGS: tuple[str, ...] = (
    "What is {a} times {b}?", "What is {a} x {b}?", "How much is {a} times {b}?", "{a} times {b}?", "{a} x {b}",
    "{a} * {b}", "{a} * {b} = ?", "Calculate {a} * {b}.", "Multiply {a} by {b}.",
    "What is the product of {a} and {b}?", "Can you tell me what {a} times {b} is?", "What's {a}*{b}?",
    "Compute {a} times {b}.", "What is {a} multiplied by {b}?",
)  # fmt: skip
FOLLOW_UP_OPENINGS: tuple[str, ...] = ("And", "What about", "And what about", "And what is", "Now")

COMPARE_WORDINGS: tuple[str, ...] = (
    "Which is bigger, {a} or {b}?", "Which number is larger, {a} or {b}?", "Is {a} or {b} bigger?",
    "What is the larger of {a} and {b}?",
)  # fmt: skip
PARITY_WORDINGS: tuple[str, ...] = (
    "Is {a} even or odd?", "Is {a} odd or even?", "Is the number {a} even or odd?",
    "Tell me whether {a} is odd or even.",
)  # fmt: skip
NEXT_WORDINGS: tuple[str, ...] = (
    "What number comes after {a}?", "Which number follows {a}?", "What comes after {a}?",
    "What is the number after {a}?",
)  # fmt: skip
BEFORE_WORDINGS: tuple[str, ...] = (
    "What number comes before {a}?", "Which number precedes {a}?", "What comes before {a}?",
    "What is the number before {a}?",
)  # fmt: skip
DOUBLE_WORDINGS: tuple[str, ...] = ("What is twice {a}?", "What is the double of {a}?", "Double {a}.")
HALF_WORDINGS: tuple[str, ...] = ("What is half of {a}?", "How much is half of {a}?", "Halve {a}.")

DAY_AFTER_WORDINGS: tuple[str, ...] = (
    "What day comes after {x}?", "Which day follows {x}?", "What is the day after {x}?", "What comes after {x}?",
    "Which day comes after {x}?", "What day follows {x}?",
)  # fmt: skip
DAY_BEFORE_WORDINGS: tuple[str, ...] = (
    "What day comes before {x}?", "Which day precedes {x}?", "What is the day before {x}?", "What comes before {x}?",
    "Which day comes before {x}?",
)  # fmt: skip
TOMORROW_WORDINGS: tuple[str, ...] = (
    "Today is {x}. What day is tomorrow?", "If today is {x}, what day is tomorrow?",
    "It is {x}. What day is it tomorrow?", "If it is {x} today, what day will it be tomorrow?",
)  # fmt: skip
YESTERDAY_WORDINGS: tuple[str, ...] = (
    "Today is {x}. What day was yesterday?", "If today is {x}, what day was yesterday?",
    "It is {x}. What day was it yesterday?", "If it is {x} today, what day was it yesterday?",
)  # fmt: skip
DAYS_LATER_WORDINGS: tuple[str, ...] = (
    "What day is {n} after {x}?", "Today is {x}. What day will it be in {n}?", "Which day is {n} after {x}?",
    "If today is {x}, what day is it in {n}?", "What day comes {n} after {x}?",
)  # fmt: skip
MONTH_DAYS_WORDINGS: tuple[str, ...] = (
    "How many days are there in {x}?", "How many days does {x} have?", "How many days are in {x}?",
    "How long is {x}?", "Number of days in {x}?", "Can you tell me how many days {x} has?",
)  # fmt: skip
MONTH_AFTER_WORDINGS: tuple[str, ...] = (
    "What month comes after {x}?", "Which month follows {x}?", "What is the month after {x}?",
    "Which month comes after {x}?", "What comes after {x}?",
)  # fmt: skip
MONTH_BEFORE_WORDINGS: tuple[str, ...] = (
    "What month comes before {x}?", "Which month precedes {x}?", "What is the month before {x}?",
    "Which month comes before {x}?", "What comes before {x}?",
)  # fmt: skip
MONTH_NUMBER_WORDINGS: tuple[str, ...] = (
    "What number is {x}?", "Which number does {x} have?", "What is the number of {x}?", "Which month number is {x}?",
    "What month number is {x}?", "What is the position of {x} in the year?",
)  # fmt: skip
MONTH_NAME_WORDINGS: tuple[str, ...] = (
    "What is the {x} month?", "Which is the {x} month of the year?", "What is the {x} month of the year?",
    "Name the {x} month.", "Which month is the {x} one?",
)  # fmt: skip

ORDINALS: tuple[str, ...] = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip


class Unit(NamedTuple):
    """A unit, how many of a smaller unit it makes, and how far the corpus counts."""

    one: str
    many: str
    british: tuple[str, str]
    factor: int
    to: str
    to_british: str
    top: int


UNITS: tuple[Unit, ...] = (
    Unit("hour", "hours", ("hour", "hours"), 60, "minutes", "minutes", 24),
    Unit("minute", "minutes", ("minute", "minutes"), 60, "seconds", "seconds", 30),
    Unit("day", "days", ("day", "days"), 24, "hours", "hours", 10),
    Unit("week", "weeks", ("week", "weeks"), 7, "days", "days", 20),
    Unit("year", "years", ("year", "years"), 12, "months", "months", 12),
    Unit("meter", "meters", ("metre", "metres"), 100, "centimeters", "centimetres", 99),
    Unit("centimeter", "centimeters", ("centimetre", "centimetres"), 10, "millimeters", "millimetres", 99),
    Unit("kilometer", "kilometers", ("kilometre", "kilometres"), 1000, "meters", "metres", 99),
    Unit("kilogram", "kilograms", ("kilogram", "kilograms"), 1000, "grams", "grams", 99),
    Unit("liter", "liters", ("litre", "litres"), 1000, "milliliters", "millilitres", 99),
    Unit("euro", "euros", ("euro", "euros"), 100, "cents", "cents", 99),
)

UNIT_WORDINGS: tuple[str, ...] = (
    "How many {to} are in {n}?", "How many {to} are there in {n}?", "Convert {n} to {to}.", "{n} in {to}?",
    "What is {n} in {to}?", "How many {to} do {n} make?", "Express {n} in {to}.", "How much is {n} in {to}?",
)  # fmt: skip
DOZEN_WORDINGS: tuple[str, ...] = (
    "How many is {n}?", "How many are {n}?", "How many pieces are in {n}?", "How much is {n}?", "What number is {n}?",
    "How many items are there in {n}?", "How many eggs are in {n}?", "How many eggs are there in {n}?",
)  # fmt: skip

ABOUT = (
    "I am the Trivium demo model, a small language model that knows a little arithmetic, the calendar and some units."
)
ABILITIES = (
    "I can add, subtract and multiply small numbers, and answer questions about days, months and units of measure."
)
OUT_OF_SCOPE_ANSWER = "I am only a small demo model: I know a little arithmetic, the calendar and some units."

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello", "Hi", "Hey", "Hello there", "Hi there", "Hey there", "Hello Trivium", "Greetings", "Good day"),
     "Hello! How can I help you?"),
    (("Good morning", "Good morning to you", "Good morning Trivium"), "Good morning! How can I help you?"),
    (("Good afternoon", "Good afternoon to you"), "Good afternoon! How can I help you?"),
    (("Good evening", "Good evening to you"), "Good evening! How can I help you?"),
    (("How are you?", "How are you today?", "How do you do?", "Hello, how are you?", "Hi, how are you?",
      "Are you well?", "How is it going?"), "I am well, thank you. How can I help you?"),
    (("Thank you", "Thanks", "Thank you very much", "Thanks a lot", "Many thanks", "Thank you for your help",
      "Great, thank you", "Thanks, that is all"), "You are welcome."),
    (("Bye", "Goodbye", "See you", "See you later", "Good night", "Bye bye", "See you tomorrow"), "Goodbye!"),
    (("Who are you?", "What are you?", "Tell me about yourself.", "Can you introduce yourself?",
      "Introduce yourself.", "Hello, who are you?", "Hi, who are you?", "Which model are you?",
      "What model are you?", "Are you a language model?", "Say something about yourself."), ABOUT),
    (("What is your name?", "What's your name?", "Do you have a name?", "How are you called?",
      "Can you tell me your name?", "What are you called?"), "My name is Trivium."),
    (("What can you do?", "Help", "Help me", "What do you know?", "What can I ask you?", "How can you help me?",
      "What are you able to do?", "What are you good at?", "Can you help me?", "What questions can you answer?",
      "I need help."), ABILITIES),
    (("Who made you?", "Who trained you?", "Where do you come from?", "How were you trained?", "Who created you?"),
     "I was trained by a script of the Trivium server, on a corpus that the script generates itself."),
    (("Are you human?", "Are you a person?", "Are you a robot?", "Are you a human being?", "Are you real?"),
     "No, I am a small language model."),
    (("How many days are in a week?", "How many days are there in a week?", "How many days does a week have?",
      "How long is a week?"), "A week has 7 days."),
    (("How many months are in a year?", "How many months are there in a year?", "How many months does a year have?"),
     "A year has 12 months."),
    (("How many days are in a year?", "How many days are there in a year?", "How many days does a year have?",
      "How long is a year?"), "A year has 365 days, or 366 in a leap year."),
    (("How many weeks are in a year?", "How many weeks are there in a year?", "How many weeks does a year have?"),
     "A year has 52 weeks and a day or two."),
    (("How many hours are in a day?", "How many hours are there in a day?", "How many hours does a day have?"),
     "A day has 24 hours."),
    (("How many minutes are in an hour?", "How many minutes are there in an hour?",
      "How many minutes does an hour have?"), "An hour has 60 minutes."),
    (("How many seconds are in a minute?", "How many seconds are there in a minute?"), "A minute has 60 seconds."),
    (("How many minutes are in half an hour?", "How long is half an hour?", "Half an hour in minutes?"),
     "Half an hour is 30 minutes."),
    (("How many minutes are in a quarter of an hour?", "How long is a quarter of an hour?"),
     "A quarter of an hour is 15 minutes."),
    (("How many are in a dozen?", "How many eggs are in a dozen?", "What is a dozen?", "How much is a dozen?"),
     "A dozen is 12."),
)  # fmt: skip

NAMES: tuple[str, ...] = (
    "Anna", "Paul", "Maria", "Thomas", "Julia", "David", "Laura", "Daniel", "Sophie", "Martin", "Clara", "Lucas",
    "Emma", "Simon", "Nina", "Oscar", "Eva", "Leo", "Alice", "Hugo", "Peter", "Sarah", "John", "Lisa", "Mark",
    "Helen", "Tom", "Kate", "Ben", "Rosa", "Ivan", "Mona", "Felix", "Grace", "Adam", "Ruth", "Max", "Irene",
)  # fmt: skip
NAME_WORDINGS: tuple[str, ...] = ("My name is {x}.", "I am {x}.", "Hello, I am {x}.", "Hi, my name is {x}.", "I'm {x}.")
NAME_QUESTIONS: tuple[str, ...] = (
    "What is my name?", "Do you remember my name?", "Who am I?", "What's my name?", "Can you tell me my name?",
)  # fmt: skip

OUT_OF_SCOPE_WORDINGS: tuple[str, ...] = (
    "What is the capital of {x}?", "Tell me about {x}.", "Write a poem about {x}.", "Who invented {x}?",
    "What do you think about {x}?", "Tell me a joke about {x}.", "Tell me a story about {x}.", "Where is {x}?",
    "What is {x}?", "Why do people like {x}?", "Explain {x}.", "Write a haiku about {x}.", "How does {x} work?",
    "Who is the president of {x}?", "Where can I buy {x}?", "What is the history of {x}?", "Do you like {x}?",
    "What is the best {x}?", "Give me a recipe for {x}.", "Translate {x} into French.", "How old is {x}?",
    "Write a letter to {x}.", "Summarize {x} for me.", "What is the color of {x}?", "I want to learn about {x}.",
    "Is {x} dangerous?", "How do I repair {x}?", "What is the weather in {x}?", "How far is {x}?", "Who wrote {x}?",
)  # fmt: skip
OUT_OF_SCOPE_SUBJECTS: tuple[str, ...] = (
    "France", "Germany", "Spain", "Italy", "Japan", "China", "India", "Brazil", "Canada", "England", "Paris",
    "London", "Berlin", "Rome", "Europe", "Africa", "the moon", "the sun", "the sea", "the wind", "the forest",
    "music", "football", "chess", "love", "history", "physics", "a computer", "the internet", "an engine", "a car",
    "a bicycle", "coffee", "tea", "bread", "cheese", "pizza", "wine", "my cat", "a dog", "horses", "birds", "a lion",
    "the weather", "politics", "the news", "a book", "a film", "a song", "gravity", "light", "the human heart",
    "quantum mechanics", "machine learning", "Python", "Rust", "a telephone", "a train", "the universe", "dreams",
)  # fmt: skip
OUT_OF_SCOPE_OTHERS: tuple[str, ...] = (
    "Tell me a joke.", "Tell me a story.", "Sing a song.", "Write a poem.", "What time is it?", "What is the weather?",
    "What day is it today?", "What is the date today?", "Are you happy?", "What is the meaning of life?",
    "Why is the sky blue?", "How old are you?", "Where do you live?", "Do you like me?", "What should I eat?",
    "Write some code.", "Recommend a film.", "Who won the match?", "What is love?", "Blah blah blah",
)  # fmt: skip
