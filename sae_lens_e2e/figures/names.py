"""Names as they fit into a figure."""

from collections import Counter
from collections.abc import Iterable
from itertools import takewhile

LONGEST_LABEL, LONGEST_HOOK = 44, 24


def labels(names: Iterable[str]) -> dict[str, str]:
    """Names as they fit into a legend: without the folders they share, and what is too long shortened in its middle."""
    names = list(dict.fromkeys(names))
    seen: Counter[str] = Counter()
    found = {}
    for name, own in zip(names, _without_shared_start(names, "/"), strict=True):
        short = shortened(own, LONGEST_LABEL)
        seen[short] += 1
        found[name] = short if seen[short] == 1 else f"{short} ({seen[short]})"
    return found


def hook_labels(hooks: Iterable[str]) -> dict[str, str]:
    """Hooks without what goes without saying: '4.resid_pre' for 'blocks.4.hook_resid_pre', 'h.4' for 'transformer.h.4'."""
    hooks = list(dict.fromkeys(hooks))
    plain = [hook.removeprefix("blocks.").replace("hook_", "") for hook in hooks]
    # The last part that all share says what the number after it counts.
    own = _without_shared_start(plain, ".", keep=1)
    if max(map(len, own), default=0) > LONGEST_HOOK:
        own = [_backwards(name) for name in _without_shared_start([_backwards(name) for name in own], ".")]
    return {hook: shortened(name, LONGEST_HOOK) for hook, name in zip(hooks, own, strict=True)}


def shortened(text: str, longest: int) -> str:
    """Text of at most `longest` characters, with an ellipsis for its middle if it has more."""
    if len(text) <= longest:
        return text
    half = (longest - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def tick_number(value: float) -> str:
    """A round number: '0.05', '1', '20', and '10⁻⁵' where it is very small or large."""
    if 1e-3 <= value < 1e5:
        return f"{value:g}"
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}·{power}"


def _backwards(name: str) -> str:
    return ".".join(reversed(name.split(".")))


def _without_shared_start(names: list[str], separator: str, keep: int = 0) -> list[str]:
    """Names without the parts that all begin with, but for the last `keep` of these; a single name as it is."""
    parts = [name.split(separator) for name in names]
    # A name's own last part always stays.
    leading = zip(*(of_name[:-1] for of_name in parts), strict=False)
    n_shared = sum(1 for _ in takewhile(lambda at: len(set(at)) == 1, leading)) if len(names) > 1 else 0
    return [separator.join(of_name[max(n_shared - keep, 0) :]) for of_name in parts]
