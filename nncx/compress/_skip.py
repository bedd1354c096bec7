"""Which layers a user wants to be left as they are."""

from collections.abc import Callable, Iterable

from torch import nn

Skip = Iterable[str] | Callable[[str, nn.Module], bool]


def names_of(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names: a shared one has several."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def skipped(names: dict[nn.Module, list[str]], skip: Skip, task: str) -> set[nn.Module]:
    """The modules that a user's `skip` means; `task` is the function whose argument it is."""
    if callable(skip):
        return {m for m, its in names.items() if any(skip(name, m) for name in its)}
    if isinstance(skip, str):
        raise ValueError(f"{task}: skip must be a list of names, got {skip!r}; pass [{skip!r}]")
    wanted = list(skip)
    known = {name for its in names.values() for name in its}
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"{task}: skip names {name!r}, which the model does not have; take names from"
                " model.named_modules()"
            )
    return {
        module
        for module, its in names.items()
        if any(f"{name}.".startswith(f"{block}.") for name in its for block in wanted)
    }
