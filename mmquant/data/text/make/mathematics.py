"""Worked problems whose numbers are computed: `python mathematics.py OUT`. The sentences are ours."""

from __future__ import annotations

import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

Text = Callable[[random.Random], str]


def polynomial(coefficients: list[int], name: str = "x") -> str:
    """A polynomial as it is written, the highest power first."""
    terms = []
    for power, c in reversed(list(enumerate(coefficients))):
        if c:
            size = "" if abs(c) == 1 and power else str(abs(c))
            body = size + ("" if power == 0 else name if power == 1 else f"{name}^{power}")
            terms.append(("-" if c < 0 else "+", body))
    if not terms:
        return "0"
    head = ("-" if terms[0][0] == "-" else "") + terms[0][1]
    return head + "".join(f" {sign} {body}" for sign, body in terms[1:])


def quadratic(rng: random.Random) -> str:
    """An equation with rational roots, by the discriminant and by factoring."""
    p, q, a = rng.randint(-9, 9), rng.randint(-9, 9), rng.choice([1, 1, 2, 3, 5])
    b, c = -a * (p + q), a * p * q
    d = b * b - 4 * a * c
    roots = f"x = {p}" if p == q else f"x_1 = {max(p, q)} and x_2 = {min(p, q)}"
    return (
        f"Problem. Solve ${polynomial([c, b, a])} = 0$ over the real numbers.\n\n"
        f"Solution. Here $a = {a}$, $b = {b}$, $c = {c}$, so the discriminant is\n"
        f"$$\\Delta = b^2 - 4ac = {b * b} - {4 * a * c} = {d} = {math.isqrt(d)}^2.$$\n"
        f"By the quadratic formula $x = \\frac{{{-b} \\pm {math.isqrt(d)}}}{{{2 * a}}}$, hence ${roots}$. "
        f"As a check, the roots add to ${p + q} = -b/a$ and multiply to ${p * q} = c/a$ (Vieta).\n"
    )


def euclid(rng: random.Random) -> str:
    """The greatest common divisor and Bezout's coefficients, line by line."""
    g = rng.randint(2, 40)
    a, b = sorted((g * rng.randint(10, 90), g * rng.randint(10, 90)), reverse=True)
    lines, x, y = [], a, b
    s, t = (1, 0), (0, 1)
    while y:
        k, r = divmod(x, y)
        lines.append(f"{x} = {k} * {y} + {r}")
        x, y, s, t = y, r, t, (s[0] - k * t[0], s[1] - k * t[1])
    return (
        f"Compute gcd({a}, {b}) by the Euclidean algorithm.\n\n" + "\n".join(lines) + "\n\n"
        f"The last remainder that is not zero is {x}, so gcd({a}, {b}) = {x} and lcm({a}, {b}) = {a * b // x}. Going "
        f"back through the lines gives Bezout's identity {x} = ({s[0]}) * {a} + ({s[1]}) * {b}.\n"
    )


def derivative(rng: random.Random) -> str:
    """Extrema of a cubic."""
    p, q = sorted(rng.sample(range(-5, 6), 2))
    c = [rng.randint(-9, 9), 6 * p * q, -3 * (p + q), 2]
    first = [c[1], 2 * c[2], 3 * c[3]]

    def at(x: int) -> int:
        return sum(value * x**power for power, value in enumerate(c))

    return (
        f"Find the local extrema of f(x) = {polynomial(c)}.\n\n"
        f"f'(x) = {polynomial(first)} = 6(x - ({p}))(x - ({q})), which vanishes at x = {p} and x = {q}. "
        f"The second derivative is f''(x) = {polynomial([2 * c[2], 6 * c[3]])}: f''({p}) = {2 * c[2] + 12 * p} < 0, "
        f"a maximum; f''({q}) = {2 * c[2] + 12 * q} > 0, a minimum. The values are f({p}) = {at(p)} and "
        f"f({q}) = {at(q)}.\n"
    )


def matrices(rng: random.Random) -> str:
    """A product, a determinant, an inverse in LaTeX."""
    a, b = ([[rng.randint(-6, 6) for _ in range(2)] for _ in range(2)] for _ in range(2))
    product = [[sum(a[i][k] * b[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    d = a[0][0] * a[1][1] - a[0][1] * a[1][0]

    def tex(m: list[list[int]]) -> str:
        return r"\begin{pmatrix} " + r" \\ ".join(" & ".join(map(str, row)) for row in m) + r" \end{pmatrix}"

    inverse = tex([[a[1][1], -a[0][1]], [-a[1][0], a[0][0]]])
    says = f"$A^{{-1}} = \\frac{{1}}{{{d}}}{inverse}$" if d else "$A$ has no inverse, its columns are dependent"
    return (
        f"Let $A = {tex(a)}$ and $B = {tex(b)}$. Then\n\\[ AB = {tex(product)}, \\qquad \\det A = "
        f"{a[0][0]} \\cdot {a[1][1]} - ({a[0][1]}) \\cdot ({a[1][0]}) = {d}, \\]\nso {says}; "
        f"$\\operatorname{{tr}} A = {a[0][0] + a[1][1]}$ and the characteristic polynomial is "
        f"$\\lambda^2 - ({a[0][0] + a[1][1]})\\lambda + ({d})$.\n"
    )


def chance(rng: random.Random) -> str:
    """A binomial distribution as a table, with mean and variance."""
    n, k = rng.randint(4, 9), rng.randint(2, 9)
    p = Fraction(1, k)
    rows = [(i, math.comb(n, i) * p**i * (1 - p) ** (n - i)) for i in range(n + 1)]
    body = "\n".join(f"| {i} | {value} | {float(value):.4f} |" for i, value in rows)
    least = 1 - rows[0][1]
    return (
        f"An experiment succeeds with probability {p}; it is repeated {n} times, independently. How are the successes "
        f"X distributed?\n\n| X | exact | decimal |\n| --- | --- | --- |\n{body}\n\n"
        f"E[X] = np = {n * p}, Var[X] = np(1 - p) = {n * p * (1 - p)}. At least one success has probability "
        f"1 - P(X = 0) = {least} = {float(least):.2%}.\n"
    )


def data_set(rng: random.Random) -> str:
    """Mean, median, deviation, a least-squares line."""
    slope, noise = rng.uniform(-3, 3), rng.uniform(0.3, 3)
    xs = list(range(1, rng.randint(6, 11)))
    ys = [round(slope * x + rng.gauss(5, noise), 1) for x in xs]
    m, c = statistics.linear_regression(xs, ys)
    pairs = "  ".join(f"({x}, {y})" for x, y in zip(xs, ys, strict=True))
    return (
        f"Data: {pairs}\n\nn = {len(xs)}, mean of y = {statistics.mean(ys):.3f}, median = {statistics.median(ys):.2f}, "
        f"sample standard deviation = {statistics.stdev(ys):.3f}. Least squares: y = {m:.3f} x "
        f"{'+' if c >= 0 else '-'} {abs(c):.3f}, r = {statistics.correlation(xs, ys):.3f}. "
        f"At x = {len(xs) + 1} the line predicts {m * (len(xs) + 1) + c:.2f}; that is extrapolation, so take it with "
        "care.\n"
    )


def newton(rng: random.Random) -> str:
    """Newton's iteration for a root, printed as it converges."""
    n, k = rng.randint(2, 99), rng.choice([2, 3])
    x, lines = float(max(1, n // 2)), []
    for step in range(7):
        lines.append(f"{step:2d}  {x:.12f}  {x**k - n:+.3e}")
        x -= (x**k - n) / (k * x ** (k - 1))
    return (
        f"Newton's method for f(x) = x^{k} - {n}: x_(i+1) = x_i - f(x_i) / f'(x_i), f'(x) = {k}x^{k - 1}.\n\n"
        " i  x_i             f(x_i)\n" + "\n".join(lines) + f"\n\nThe {'square' if k == 2 else 'cube'} root of {n} is "
        f"{n ** (1 / k):.12f}. The number of right digits about doubles with every step, as the theory says.\n"
    )


def interest(rng: random.Random) -> str:
    """Compound interest, year by year."""
    start, rate, years = rng.randint(5, 200) * 100, rng.randint(10, 75) / 10, rng.randint(4, 9)
    value, lines = float(start), []
    for year in range(1, years + 1):
        gain = value * rate / 100
        lines.append(f"Year {year:>2}: {value:>11,.2f} + {gain:>9,.2f} = {value + gain:>11,.2f}")
        value += gain
    twice = math.log(2) / math.log(1 + rate / 100)
    return (
        f"A deposit of {start:,} EUR earns {rate} % a year, compounded yearly.\n\n" + "\n".join(lines) + "\n\n"
        f"In closed form {start} * (1 + {rate}/100)^{years} = {value:,.2f}. It doubles after ln 2 / ln "
        f"{1 + rate / 100:.3f} = {twice:.1f} years; the rule of 72 says {72 / rate:.1f}.\n"
    )


def bases(rng: random.Random) -> str:
    """A number in several bases, and modular powers."""
    n, m, e, b = rng.randint(200, 60000), rng.randint(7, 97), rng.randint(10, 200), rng.randint(2, 9)
    left, digits = n, []
    while left:
        digits.append(f"{left} = 2 * {left // 2} + {left % 2}")
        left //= 2
    return (
        f"{n} in binary: " + "; ".join(digits[:6]) + f"; ... = {n:b}_2 = {n:o}_8 = {n:X}_16.\n"
        f"{b}^{e} mod {m}: write {e} = {e:b}_2 and square: the answer is {pow(b, e, m)}.\n"
        f"phi({m}) = {sum(math.gcd(i, m) == 1 for i in range(1, m + 1))}.\n"
    )


def story(rng: random.Random) -> str:
    """A word problem with its reasoning."""
    a, b, c = rng.randint(12, 90), rng.randint(3, 11), rng.randint(2, 9)
    who = rng.choice(["Amina", "Jonas", "Mei", "Priya", "Tomás", "Olena", "Kofi", "Sana", "Luca", "Yuki"])
    thing = rng.choice(["notebooks", "apples", "tickets", "litres of paint", "eggs", "tiles", "postcards"])
    left = a * b - c * b
    return (
        f"{who} packs {a} boxes with {b} {thing} each. {c} boxes are damaged on the way. How many {thing} arrive, and "
        f"what share is that?\n\nFirst count everything: {a} * {b} = {a * b}. The damaged boxes hold {c} * {b} = "
        f"{c * b}. So {a * b} - {c * b} = {left} arrive. Of the boxes that is ({a} - {c}) / {a} = "
        f"{Fraction(a - c, a)}, "
        f"about {100 * (a - c) / a:.1f} %. The answer does not depend on {b}, since every box holds the same.\n"
        f"Answer: {left} {thing}, {100 * (a - c) / a:.1f} %.\n"
    )


def triangle(rng: random.Random) -> str:
    """Heron's formula and the law of cosines."""
    while True:
        a, b, c = (rng.randint(3, 30) for _ in range(3))
        if a + b > c and b + c > a and a + c > b:
            break
    s = (a + b + c) / 2
    area = math.sqrt(s * (s - a) * (s - b) * (s - c))
    cosine = (a * a + b * b - c * c) / (2 * a * b)
    return (
        f"Triangle with sides a = {a}, b = {b}, c = {c}. s = (a + b + c)/2 = {s}; area = sqrt(s(s-a)(s-b)(s-c)) = "
        f"{area:.4f}. cos(gamma) = (a^2 + b^2 - c^2)/(2ab) = {cosine:.4f}, gamma = "
        f"{math.degrees(math.acos(cosine)):.2f} degrees. Radius of the incircle: area/s = "
        f"{area / s:.4f}; of the circumcircle: abc/(4 area) = "
        f"{a * b * c / (4 * area):.4f}.\n"
    )


MATHEMATICS: tuple[Text, ...] = (
    quadratic,
    euclid,
    derivative,
    matrices,
    chance,
    data_set,
    newton,
    interest,
    bases,
    story,
    triangle,
)


def main() -> None:
    """The command line."""
    out, rng = Path(sys.argv[1]) / "mathematics", random.Random(41)
    texts = ["\n".join(rng.choice(MATHEMATICS)(rng) for _ in range(3)) for _ in range(110)]
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text, "source": "mmquant"}, ensure_ascii=False) for text in texts]
    (out / "computed.jsonl").write_text("\n".join(rows) + "\n", "utf-8")


if __name__ == "__main__":
    main()
