"""Writes the LaTeX formulas of a docstring as plain text for a terminal."""

import re
import unicodedata

TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\s+|[^\\\s]", re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)
SYMBOLS = {
    **{"alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "eta": "η", "theta": "θ", "kappa": "κ", "mu": "μ"},
    **{"xi": "ξ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "omega": "ω", "Delta": "Δ", "Phi": "Φ"},
    **{"epsilon": "ε", "varepsilon": "ε", "lambda": "λ", "phi": "φ", "varphi": "φ", "ell": "ℓ", "partial": "∂"},
    **{"sum": "Σ", "prod": "Π", "nabla": "∇", "infty": "∞", "top": "⊤", "odot": "⊙", "cdot": "·", "times": "×"},
    **{"le": "≤", "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "sim": "~", "in": "∈"},
    **{"pm": "±", "leftarrow": "←", "to": "→", "rightarrow": "→", "mid": "|", "|": "‖", "lVert": "‖", "rVert": "‖"},
    **{"langle": "⟨", "rangle": "⟩", "dots": "...", "ldots": "...", "bmod": "mod", "quad": "  ", "qquad": "   "},
    **dict.fromkeys((",", ";", " ", ":"), " "),
    **dict.fromkeys(("!", "left", "right", "big", "Big", "bigl", "bigr", "textstyle", "displaystyle"), ""),
}
"""Maps commands without an argument to text; others, such as `log`, keep their name."""
NAMES = ("mathrm", "mathbf", "mathcal", "text", "operatorname")
"""Commands whose argument is written as it is."""
ACCENTS = {"hat": "\u0302", "bar": "\u0304", "tilde": "\u0303", "dot": "\u0307"}
SCRIPTS = {
    "_": dict(zip("0123456789+-=()aehijklmnoprstuvx", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ", strict=True)),
    "^": dict(zip("0123456789+-=()ijklmnT⊤", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁱʲᵏˡᵐⁿᵀᵀ", strict=True)),
}
"""Maps characters to those of Unicode that are written low and high."""


def readable(text: str) -> str:
    r"""Write every formula of a text, `$...$` or `$$...$$`, without LaTeX.

    >>> readable(r"The loss $L_i = -\lambda_i \log q_i[y]$ of $h_{i-1}$.")
    'The loss Lᵢ = -λᵢ log qᵢ[y] of hᵢ₋₁.'
    """
    return FORMULA.sub(lambda found: formula(found[1] or found[2]), text) if "$" in text else text


def formula(tex: str) -> str:
    r"""Write one formula without LaTeX.

    >>> formula(r"\frac{\partial F}{\partial h_l} = J^\top \hat u + \tfrac12 \sqrt{a + b}")
    '∂F/∂hₗ = Jᵀ û + 1/2 √(a + b)'
    >>> formula(r"e^{\theta - g} \in \mathbb{R}^{d_0 \times K}, \mathrm{softmax}(W_L)")
    'e^(θ - g) ∈ R^(d₀ × K), softmax(W_L)'
    """
    said = _line(TOKEN.findall(tex)[::-1]).strip()
    return re.sub(r"(?<=\S) {2}(?=\S)", " ", said)  # a thin space beside an ordinary one


def _line(tokens: list[str]) -> str:
    """The tokens up to a closing brace or the end; the next one is the last of the list."""
    parts = []
    while tokens and tokens[-1] != "}":
        parts.append(_part(tokens))
    if tokens:
        tokens.pop()
    return "".join(parts)


def _argument(tokens: list[str]) -> str:
    _skip_space(tokens)
    return _part(tokens) if tokens else ""


def _skip_space(tokens: list[str]) -> None:
    while tokens and tokens[-1].isspace():
        tokens.pop()


def _part(tokens: list[str]) -> str:
    token = tokens.pop()
    if token == "{":
        return _line(tokens)
    if token in SCRIPTS:
        return _script(token, _argument(tokens))
    if not token.startswith("\\"):
        return token
    name = token[1:]
    if name in ("frac", "tfrac"):
        return f"{_grouped(_argument(tokens))}/{_grouped(_argument(tokens))}"
    if name == "sqrt":
        return f"√{_grouped(_argument(tokens))}"
    if name in ACCENTS:
        return unicodedata.normalize("NFC", _argument(tokens) + ACCENTS[name])
    if name in (*NAMES, "mathbb"):
        return _argument(tokens)
    if name in ("partial", "nabla", "Delta"):
        _skip_space(tokens)
    return SYMBOLS.get(name, name)


def _script(where: str, text: str) -> str:
    text = text.strip()
    known = SCRIPTS[where]
    if all(char in known for char in text.replace(" ", "")):
        return "".join(known[char] for char in text.replace(" ", ""))
    return where + _grouped(text)


def _grouped(text: str) -> str:
    """Put a text of several parts in parentheses.

    >>> _grouped("a + b"), _grouped("2B"), _grouped("h"), _grouped("f(x)")
    ('(a + b)', '(2B)', 'h', 'f(x)')
    """
    return f"({text})" if re.search(r"[\s+*/-]|^\d+[^\W\d]", text.strip()) else text
