"""`tabom recipe`: where a YAML file of the package is, to be read, copied, or given to `accelerate launch`."""

from tabom.cli.arguments import RECIPES, suggestion
from tabom.cli.commands import RecipeArguments


def run(arguments: RecipeArguments) -> None:
    """Prints the path of the file, or of all files."""
    files = {path.stem: path for path in sorted(RECIPES.rglob("*.yaml"))}
    if arguments.name is None:
        print(*files.values(), sep="\n")
        return
    if arguments.name not in files:
        hint = suggestion(arguments.name, list(files)) or f"; there are {', '.join(files)}"
        raise ValueError(f"name={arguments.name}: no such file{hint}")
    print(files[arguments.name])
