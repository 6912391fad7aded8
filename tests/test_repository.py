"""What the repository promises of itself: budgets, imports, and that its README tells the truth."""

import ast
import re
import sys

import pytest
from conftest import ROOT

MODELS = [name for name in ("igpt", "vit", "clip", "mae", "jepa", "repa") if (ROOT / f"{name}.py").exists()]
LINES = dict(vit=350, mae=350, igpt=400, jepa=491, clip=762, repa=550, common=220, data=789)
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("name", [*MODELS, "common", "data"])
def test_line_budget(name):
    lines = (ROOT / f"{name}.py").read_text().splitlines()
    assert len(lines) <= LINES[name] and max(map(len, lines)) <= 100


@pytest.mark.parametrize("name", MODELS)
def test_the_training_loop_fits_a_screen(name):
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    train, = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno - train.lineno < 70


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")], ids=lambda path: path.name)
def test_imports(path):
    """Four packages and no more; a model script never takes from another model script."""
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm"}
    if path.stem in MODELS:
        allowed |= {"common", "data"}
    elif path.parent.name == "tests":
        allowed |= {"pytest", "conftest", "common", "data", *MODELS}
        peers = {"timm", "transformers", "src", "loss", "models", "samplers"}  # the last four are the authors'
        allowed |= peers if path.stem == "benchmark" else set()
    assert set(imports(path)) <= allowed


def test_nothing_happens_at_import():
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            loop = isinstance(node, (ast.For, ast.While, ast.With))
            guarded = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert not call and not loop and (guarded or not isinstance(node, ast.If)), f"{path.name}:{node.lineno}"


def blocks():
    return re.findall(r"^```\w*\n(.*?)^```", README, re.M | re.S)


def commands():
    """Every `python script.py ...` line in README and in the scripts' docstrings."""
    texts = [README] + [ast.get_docstring(ast.parse(path.read_text())) for path in ROOT.glob("*.py")]
    for line in "\n".join(texts).splitlines():
        for match in re.finditer(r"python ((?:tests/)?\w+\.py)((?: +[^#&|`]+)?)", line):
            yield match[1], match[2].split()


def test_commands_name_real_scripts_and_options():
    import importlib
    found = list(commands())
    assert len(found) >= 5
    for script, words in found:
        assert (ROOT / script).is_file(), script
        if script.startswith("tests/"):
            continue
        module = importlib.import_module(script[:-3])
        options = [word for word in words if word.startswith("--")]
        known = vars(module.parse_args([]))
        for name in (word[2:].replace("-", "_") for word in options):
            assert {name, name.removeprefix("no_")} & set(known), (script, name)


def test_files_in_the_readme_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README):
        assert (ROOT / path).exists(), path
    for script in re.findall(r"`(\w+\.py)", README):
        assert (ROOT / script).exists() or (ROOT / "tests" / script).exists(), script


def assigned(node):
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else None


def test_functions_in_the_readme_exist():
    """`vit.py: ViT.tokens` names a script and what stands in it."""
    for script, name in re.findall(r"`(\w+)\.py: ([\w.]+)`", README):
        body = ast.parse((ROOT / f"{script}.py").read_text()).body
        for part in name.split("."):
            node = next((n for n in body if part in (getattr(n, "name", None), assigned(n))), None)
            assert node is not None, f"{script}.py has no {name}"
            body = getattr(node, "body", [])


def test_readme_is_short_and_sets_up_twice():
    assert len(README.splitlines()) < 250
    assert len(re.findall(r"pip install", README)) == 2  # one installs and runs the main job, one the tests
    ci = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in ci  # which runs the test command from there, as written


def test_requirements():
    lines = (ROOT / "requirements.txt").read_text().split("\n")
    assert {re.match(r"\w*", line)[0] for line in lines} - {""} == {"torch", "numpy", "tqdm", "pytest"}
    assert next(line for line in lines if line.startswith("torch")) == "torch>=2.11,<=2.13.0"
