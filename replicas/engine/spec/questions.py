"""Questions that a model is asked when it is to write text to learn from and nobody brings prompts: forms times topics.

What is asked matters little, how varied the answers are matters much: explanations, advice, letters, lists, stories,
comparisons, code.
"""

from __future__ import annotations

import random

_FORMS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        (
            "How does {} work?",
            "Explain {} to a child.",
            "What is {}, and why does it matter?",
            "Give me five facts about {}.",
            "What are common mistakes that people make about {}?",
            "Write a short introduction to {} for beginners.",
            "I have an exam tomorrow. Help me understand {}.",
            "What should I read first if I want to learn about {}?",
        ),
        (
            "a bicycle gear", "photosynthesis", "a microwave oven", "the stock market", "vaccination", "a solar panel",
            "plate tectonics", "compound interest", "a piano", "the water cycle", "machine learning", "a jet engine",
            "inflation", "the immune system", "a search engine", "the electoral system of Germany", "black holes",
            "a heat pump", "encryption", "natural selection", "a lock with a key", "GPS", "the French Revolution",
            "sourdough bread", "the human heart", "a database index", "ocean tides", "impressionist painting",
            "supply and demand", "a thermos flask", "recycling of glass", "the periodic table", "jazz improvisation",
            "a suspension bridge", "the Roman Empire", "insulin", "wind energy", "chess openings", "a camera lens",
            "the Silk Road",
        ),
    ),
    (
        (
            "What should I do on three days in {}?",
            "Tell me about the history of {}.",
            "What food is typical of {}?",
            "Is it a good idea to travel to {} with small children?",
            "Describe {} in one paragraph.",
            "When is the best time of the year to visit {}, and what should I pack?",
        ),
        (
            "Rome", "Kyoto", "Edinburgh", "Cape Town", "Vienna", "Mexico City", "Istanbul", "New Orleans", "Prague",
            "Marrakesh", "Copenhagen", "Buenos Aires", "Seoul", "Montreal", "Athens", "Hanoi", "Reykjavik", "Chicago",
            "Barcelona", "Jaipur",
        ),
    ),
    (
        (
            "Write an email to {}.",
            "Write a short and friendly message to {}.",
            "I want to complain politely to {}. What should I write?",
            "Write a thank-you note to {}.",
        ),
        (
            "my boss, asking for a day off", "a customer whose parcel is late", "my neighbour about loud music",
            "a teacher after the parents' evening", "the bank about a wrong fee", "a friend who is moving away",
            "a company, applying for a job as a gardener", "my team after a hard project", "the doctor's office",
            "a hotel, changing my booking", "my grandmother for her birthday", "the city about a broken street lamp",
            "an airline about a lost suitcase", "a colleague who helped me", "a client, moving a meeting to Friday",
        ),
    ),
    (
        (
            "How can I {}?",
            "Give me a step-by-step plan to {}.",
            "What are the best tips to {}?",
            "Why is it so hard to {}?",
            "I have only ten minutes a day. How can I {}?",
            "Make a checklist for somebody who wants to {}.",
        ),
        (
            "sleep better", "save money every month", "cook for one person", "start running",
            "grow tomatoes on a balcony",
            "write a good essay", "prepare for a job interview", "make new friends in a new town", "read more books",
            "drink less coffee", "organise a small kitchen", "learn to play the guitar", "remember names",
            "give a speech without fear", "train a puppy", "plan a birthday party", "fix a flat tyre", "paint a room",
            "stop putting things off", "reduce stress at work", "learn to swim as an adult", "take better photographs",
            "eat more vegetables", "work from home with children", "choose a laptop",
        ),
    ),
    (
        (
            "Write a short story about {}.",
            "Write a poem about {}.",
            "Write the beginning of a novel about {}.",
            "Write a dialogue between two people about {}.",
            "Suggest ten titles for a book about {}.",
        ),
        (
            "a fox who is afraid of the dark", "the last train home", "a lost letter", "a robot that learns to cook",
            "two sisters and a boat", "winter in the mountains", "an old clock", "a detective in a small village",
            "a garden on the moon", "a dragon that collects spoons", "the first day of school", "a storm at sea",
            "a musician who cannot hear", "an honest thief", "a city without cars", "a library at night",
        ),
    ),
    (
        (
            "What is the difference between {}?",
            "Compare {} in a table.",
            "Which is better: {}?",
            "What are the advantages and disadvantages of {}?",
        ),
        (
            "cats and dogs as pets", "tea and coffee", "a lease and a loan", "Python and JavaScript",
            "trains and planes",
            "butter and margarine", "living in a city and living in a village", "a virus and a bacterium",
            "public and private schools", "books and films", "gas and electric cookers", "a comet and an asteroid",
            "renting and buying a home", "yoga and pilates", "classical and romantic music", "paper and digital notes",
        ),
    ),
    (
        (
            "Write a Python function that {}.",
            "Write a function in JavaScript that {}, and explain it.",
            "Show me a small Python program that {}, with comments.",
            "Write unit tests for a Python function that {}.",
        ),
        (
            "reverses the words of a sentence", "counts the vowels of a string", "finds the largest number in a list",
            "checks whether a number is prime", "merges two sorted lists", "reads a CSV file and sums a column",
            "removes duplicates from a list", "computes a factorial", "converts Celsius to Fahrenheit",
            "checks whether a word is a palindrome", "sorts a dictionary by its values", "generates a random password",
            "counts how often each word occurs in a text", "computes the Fibonacci numbers",
            "validates an email address",
            "implements a stack as a class",
        ),
    ),
)  # fmt: skip


def questions() -> list[str]:
    """All of them, in an order that mixes forms and topics and is always the same."""
    found = [form.format(topic) for forms, topics in _FORMS for form in forms for topic in topics]
    random.Random(0).shuffle(found)
    return found
