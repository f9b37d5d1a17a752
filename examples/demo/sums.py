"""School mathematics with its working: each kind turns random numbers into question and answer."""

import math
import random
from fractions import Fraction


def gcd(numbers: random.Random) -> tuple[str, str]:
    common = numbers.randint(1, 24)
    a, b = sorted((common * numbers.randint(2, 40), common * numbers.randint(2, 40)))
    lines, big, small = [], b, a
    while small:
        lines.append(f"{big} = {big // small} * {small} + {big % small}")
        big, small = small, big % small
    steps = "\n".join(lines)
    return (
        f"What is the greatest common divisor of {a} and {b}?",
        f"By Euclid's algorithm:\n{steps}\nThe last divisor is the answer: {big}",
    )


def product(numbers: random.Random) -> tuple[str, str]:
    a, b = numbers.randint(12, 999), numbers.randint(12, 99)
    tens, ones = b - b % 10, b % 10
    return (
        f"Calculate {a} * {b}.",
        f"{a} * {tens} = {a * tens}\n{a} * {ones} = {a * ones}\n"
        f"{a * tens} + {a * ones} = {a * b}\nThe answer: {a * b}",
    )


def fraction_sum(numbers: random.Random) -> tuple[str, str]:
    b, d = numbers.sample(range(2, 20), 2)
    a, c = numbers.randint(1, b), numbers.randint(1, d)
    common = math.lcm(b, d)
    left, right = a * common // b, c * common // d
    total = Fraction(a, b) + Fraction(c, d)
    return (
        f"What is {a}/{b} + {c}/{d}?",
        f"The common denominator is {common}.\n{a}/{b} = {left}/{common}\n"
        f"{c}/{d} = {right}/{common}\n"
        f"{left}/{common} + {right}/{common} = {left + right}/{common}\n"
        f"In lowest terms the answer: {total}",
    )


def linear(numbers: random.Random) -> tuple[str, str]:
    a, x, b = numbers.randint(2, 19), numbers.randint(-20, 40), numbers.randint(1, 60)
    c = a * x + b
    return (
        f"Solve for x: {a}x + {b} = {c}",
        f"Subtract {b} from both sides: {a}x = {c - b}\nDivide by {a}: x = {x}\n"
        f"Check:\n{a} * {x} + {b} = {c}\nThe answer: {x}",
    )


def percentage(numbers: random.Random) -> tuple[str, str]:
    rate, price = numbers.choice((5, 10, 15, 20, 25, 30, 40)), 20 * numbers.randint(1, 60)
    off = price * rate // 100
    thing = numbers.choice(("coat", "bicycle", "lamp", "table", "radio", "ticket"))
    return (
        f"A {thing} costs {price} euros and is reduced by {rate}%. What is the new price?",
        f"The reduction:\n{price} * {rate} / 100 = {off}\nThe new price:\n"
        f"{price} - {off} = {price - off}\nThe answer: {price - off}",
    )


def series(numbers: random.Random) -> tuple[str, str]:
    first, step, count = numbers.randint(1, 30), numbers.randint(2, 12), numbers.randint(5, 40)
    last = first + (count - 1) * step
    total = count * (first + last) // 2
    return (
        f"Add the first {count} terms of {first}, {first + step}, {first + 2 * step}, ...",
        f"Each term is {step} more than the one before. The last term:\n"
        f"{first} + {count - 1} * {step} = {last}\nThe sum, count times mean of the ends:\n"
        f"{count} * ({first} + {last}) / 2 = {total}\nThe answer: {total}",
    )


KINDS = (gcd, product, fraction_sum, linear, percentage, series)
