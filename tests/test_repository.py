"""What the repository promises of itself: how the code reads, what a copy needs, and that its README tells the truth."""

import ast
import contextlib
import functools
import importlib
import re
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT

import data

MODELS = ["igpt", "vit", "clip", "mae", "jepa", "repa"]
# A tripwire, not a target: 25 % above the length of the day on which each number was set.
LINES = dict(igpt=630, vit=570, clip=1240, mae=455, jepa=680, repa=895, common=280)
README = (ROOT / "README.md").read_text(encoding="utf8")
MEASUREMENTS = (ROOT / "tests" / "measurements.md").read_text(encoding="utf8")
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")])


@functools.cache
def source(name):
    return (ROOT / f"{name}.py").read_text(encoding="utf8")


@functools.cache
def tree(name):
    return ast.parse(source(name))


# --------------------------------------------------------------------------------- how the code reads


@pytest.mark.parametrize("name", LINES)
def test_length(name):
    assert len(source(name).splitlines()) <= LINES[name]


@pytest.mark.parametrize("name", [*MODELS, "common", "data"])
def test_no_line_is_over_100_columns(name):
    assert [line for line in source(name).splitlines() if len(line) > 100] == []


@pytest.mark.parametrize("name", MODELS)
def test_the_model_comes_first_and_train_fits_a_screen(name):
    first = min(node.lineno for node in tree(name).body if isinstance(node, ast.ClassDef))
    assert first <= 45
    train = definitions(name)[0]["train"]
    assert train.end_lineno - train.lineno < 80
    docstring = ast.get_docstring(tree(name), clean=False)
    assert len(docstring.splitlines()) <= 25


@pytest.mark.parametrize("name", MODELS)
def test_parts_stand_in_one_order(name):
    banners = re.findall(r"^# -{20,} (.*)$", source(name), re.M)
    assert banners[0] == "the model" and banners[-1] == "training", banners


def dense_forms(path):
    """The forms that save a line and cost a second reading, each as "file:line what"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        found = None
        if isinstance(node, ast.Expr) and isinstance(node.value, (ast.Tuple, ast.IfExp)):
            found = "a tuple or a ternary as a statement"
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.BoolOp):
            found = "`x and f(x)` for an if"
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and isinstance(node.value, ast.Lambda):
            found = "a lambda bound to a name"
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
            if isinstance(node.value, ast.GeneratorExp):
                found = "names unpacked from a generator"
            elif isinstance(node.value, ast.Tuple):
                found = "several assignments in one"
        elif isinstance(node, ast.BinOp) and any(isinstance(side, ast.Compare) for side in (node.left, node.right)):
            found = None if isinstance(node.op, (ast.BitAnd, ast.BitOr, ast.BitXor)) else "arithmetic with booleans"
        if found:
            yield f"{path.name}:{node.lineno} {found}"


def walrus(path):
    """Walruses that stand elsewhere than in the test of a plain `while` or `if`."""
    parsed = ast.parse(path.read_text(encoding="utf8"))
    allowed = set()
    for node in ast.walk(parsed):
        if isinstance(node, (ast.While, ast.If)):
            allowed |= {id(inner) for inner in ast.walk(node.test) if isinstance(inner, ast.NamedExpr)}
    for node in ast.walk(parsed):
        if isinstance(node, ast.NamedExpr) and id(node) not in allowed:
            yield f"{path.name}:{node.lineno} a walrus"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_one_statement_is_one_step(path):
    assert [*dense_forms(path), *walrus(path)] == []


def own_names():
    """The classes and functions of the repository."""
    names = set()
    for name in [*MODELS, "common", "data"]:
        names |= {node.name for node in tree(name).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    return names


@pytest.mark.parametrize("name", [*MODELS, "common", "data"])
def test_more_than_four_arguments_are_given_by_name(name):
    names = own_names()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if called in names and len(node.args) + len(node.keywords) > 4:
                arguments = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
                assert len(arguments) <= 4, f"{name}.py:{node.lineno} {called} has {len(arguments)} arguments without a name"


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_initialized_by_type(name):
    """Nobody can tell which number a matrix gets where this depends on the end of its name."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.FunctionDef) and node.name == "init_weights":
            text = ast.unparse(node)
            assert not re.search(r"endswith|startswith|named_parameters|std=0\)", text), name


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_is_short_and_last(name):
    for node in tree(name).body:
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            for i, method in enumerate(methods):
                if method.name == "from_pretrained":
                    first = method.body[1]  # after the docstring
                    assert i == len(methods) - 1 and method.end_lineno - first.lineno < 10, f"{name}.{node.name}"


@pytest.mark.parametrize("name", MODELS)
def test_every_option_is_explained_by_a_sentence(name, monkeypatch):
    helps = {}
    add = data.Parser.add

    def record(parser, option, default, help, **more):
        helps[option] = help
        add(parser, option, default, help, **more)

    monkeypatch.setattr(data.Parser, "add", record)
    args = importlib.import_module(name).parse_args([])
    assert {option[2:].replace("-", "_") for option in helps} <= set(vars(args))
    for option, help in helps.items():
        assert re.fullmatch(r"[A-Z\"].*\.", help, re.S) and len(help.split()) >= 4, f"{option}: {help}"


def test_american_spelling():
    british = re.compile(r"colour|centre|(?<!de)normalis|grey|initialis|neighbour|labelled|licence|behaviour", re.I)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), ROOT / "README.md", ROOT / "tests/measurements.md"]:
        if path.name != "test_repository.py":
            found = british.findall(path.read_text(encoding="utf8"))
            assert found == [], path.name


# ----------------------------------------------------------------------------------- what a copy needs


@functools.cache
def definitions(name):
    """{name: node} of what a file defines at its top level, and {name: "common"} of what it imports from there."""
    found = {}
    for node in tree(name).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node
    imported = {}
    for node in tree(name).body:
        if isinstance(node, ast.ImportFrom) and node.module in ("common", "data"):
            imported |= {alias.name: node.module for alias in node.names}
    return found, imported


def used(node):
    """The nodes of a definition that count: not what stands in a `raise`, from_pretrained or from_file."""
    if isinstance(node, ast.Raise) or getattr(node, "name", None) in ("from_pretrained", "from_file"):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from used(child)


@functools.cache
def needs(name, piece):
    """All (file, name) that a definition needs from this repository, those of its parts included."""
    found, imported = definitions(name)
    nodes = list(used(found[piece]))
    local = {node.arg for node in nodes if isinstance(node, ast.arg)}
    local |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    direct = set()
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in local and node.id != piece:
            if node.id in found:
                direct.add((name, node.id))
            elif node.id in imported:
                direct.add((imported[node.id], node.id))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "data":
            if "data" not in local and name != "data":
                direct.add(("data", node.attr))
    every = set(direct)
    for file, part in direct:
        every |= needs(file, part)
    return frozenset(every - {(name, piece)})


def copy_line(node):
    """What the last line of a docstring names after "also copy:"; None if there is no such line."""
    text = ast.get_docstring(node) if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else None
    match = re.search(r"To copy this, also copy:\s+(.*)\.\s*$", text or "", re.S)
    return {part.strip() for part in match[1].split(",")} if match else None


@pytest.mark.parametrize("name", [*MODELS, "common", "data"])
def test_copy_with_names_all_that_a_copy_needs(name):
    for piece, node in definitions(name)[0].items():
        expected = {part if file != "data" or name == "data" else f"data.{part}" for file, part in needs(name, piece)}
        named = copy_line(node)
        if named is not None:
            assert named == expected, f"{name}.{piece}"
        elif isinstance(node, ast.ClassDef) and name != "data":
            assert expected == set(), f"{name}.{piece} needs a line: To copy this, also copy: {', '.join(sorted(expected))}."


PIECES = {  # what students copy, and one use of it
    "common.Attention": "assert Attention(8, 2)(torch.ones(2, 3, 8)).shape == (2, 3, 8)",
    "common.MLP": "assert MLP(8, 16)(torch.ones(2, 8)).shape == (2, 8)",
    "common.Block": "assert Block(8, 2, cross=True)(torch.ones(2, 3, 8), torch.ones(2, 5, 8)).shape == (2, 3, 8)",
    "common.PatchEmbed": "assert PatchEmbed(8, 2)(torch.ones(1, 4, 12)).shape == (1, 4, 8)",
    "common.patchify": "assert patchify(torch.ones(1, 3, 4, 4), 2).shape == (1, 4, 12)",
    "common.unpatchify": "assert unpatchify(torch.ones(1, 4, 12), 2).shape == (1, 3, 4, 4)",
    "common.sincos_2d": "assert sincos_2d(8, 3).shape == (9, 8)",
    "vit.ViT": "assert ViT()(torch.ones(2, 3, 32, 32)).shape == (2, 10)",
    "vit.attention_distance": "assert attention_distance(torch.ones(1, 1, 2, 5, 5) / 5, 4).shape == (1, 2)",
    "vit.rollout": "assert rollout(torch.ones(2, 1, 2, 5, 5) / 5).shape == (1, 1, 2, 2)",
    "mae.MAE": "loss, pred, mask = MAE()(torch.randn(2, 3, 32, 32)); loss.backward(); assert pred.shape == (2, 64, 48)",
    "jepa.Encoder": "assert Encoder()(torch.ones(1, 3, 32, 32), torch.tensor([[0, 5]])).shape == (1, 2, 128)",
    "jepa.Predictor": "assert Predictor()(torch.ones(1, 2, 128), torch.tensor([[0, 5]]), torch.tensor([[7]])).shape == (1, 1, 128)",
    "jepa.IJEPA": """model = IJEPA(center=True)
index = torch.arange(64).expand(2, -1)
loss, pred = model.loss(torch.randn(2, 3, 32, 32), index[:, :40], index[None, :, 40:])
loss.backward()
model.update_target(0.9)
assert pred.shape == (1, 2, 24, 128)""",
    "jepa.random_masks": "assert random_masks(2, 64)[0].shape[0] == 2",
    "jepa.block_masks": "assert block_masks(2, 8)[1].shape == (1, 2, 39)",
    "jepa.multiblock_masks": "assert len(multiblock_masks(2, 8)[1]) == 4",
    "jepa.sample_masks": "assert sample_masks('random', 2, 8, 'cpu')[1].shape == (1, 2, 39)",
    "vit.score_classifier": """dataset = types.SimpleNamespace(test_images=torch.eye(3).reshape(3, 3, 1, 1), normalize=lambda x: x,
                                test_labels=torch.tensor([0, 1, 0]))
assert abs(score_classifier(lambda x: x.flatten(1), dataset, contextlib.nullcontext()) - 2 / 3) < 1e-6""",
    "repa.SiT": """model = SiT()
y = torch.tensor([1, 2])
loss, parts = model.loss(torch.randn(2, 3, 16, 16), y, torch.randn(2, 64, 128))
loss.backward()
assert model(torch.randn(2, 3, 16, 16), torch.rand(2), y).shape == (2, 3, 16, 16)""",
    "repa.sample": """class Model:
    null = 5
    def __call__(self, x, t, y):
        return x
y = torch.tensor([1, 2])
assert sample(Model(), torch.ones(2, 3, 4, 4), y, steps=3, method="heun", cfg=2.0).shape == (2, 3, 4, 4)""",
    "repa.Teacher": "assert Teacher()(torch.ones(2, 3, 32, 32)).shape == (2, 64, 128)",
    "clip.CLIP": """model = CLIP()
ids = torch.tensor([[1022, 5, 1023] + 74 * [0], [1022, 6, 1023] + 74 * [0]])
loss, logits = model.loss(torch.randn(2, 3, 32, 32), ids)
loss.backward()
assert logits.shape == (2, 2)""",
    "clip.ImageTransformer": "assert ImageTransformer()(torch.ones(1, 3, 32, 32)).shape == (1, 128)",
    "clip.TextTransformer": "assert TextTransformer()(torch.tensor([[1022, 5, 1023] + 74 * [0]])).shape == (1, 128)",
    "clip.CBOW": "assert CBOW()(torch.tensor([[1022, 5, 1023] + 74 * [0]])).shape == (1, 128)",
    "clip.l2_normalize": "assert abs(l2_normalize(torch.ones(2, 4), axis=1).norm() ** 2 - 2) < 1e-5",
    "clip.Tokenizer": """tokenizer = Tokenizer.train(["a red square", "a red circle"], 520)
assert tokenizer(["a red circle"]).shape == (1, 77)""",
    "igpt.ImageGPT": """model = ImageGPT(image_size=4)
loss, _ = model.loss(torch.zeros(2, 16, dtype=torch.long))
loss.backward()
assert model.sample(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 16)""",
    "igpt.fit_palette": "assert fit_palette(torch.randint(0, 255, (20, 3, 8, 8)).byte(), 4).shape == (4, 3)",
    "data.extract": """dataset = types.SimpleNamespace(normalize=lambda x: x / 255)
x = extract(lambda x: x.mean((2, 3)), dataset, torch.ones(60, 3, 4, 4, dtype=torch.uint8), contextlib.nullcontext())
assert x.shape == (60, 3)""",
    "data.linear_probe": "x = torch.eye(3).repeat(20, 1); y = x.argmax(1); assert linear_probe(x, y, x, y) == 1",
    "data.knn": "x = torch.eye(3).repeat(20, 1); y = x.argmax(1); assert knn(x, y, x, y) == 1",
    "data.frechet": "x = torch.randn(50, 3); assert abs(frechet(x, x)) < 1e-6",
    "data.augment": "assert augment(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, 3, 8, 8)",
    "data.batch_index": "assert len(batch_index(10, 4, 0, 0)) == 4",
}


@pytest.mark.parametrize("piece", PIECES)
def test_a_copy_runs_alone(piece):
    """The source of what the docstring names, and the imports of packages: pasted into a fresh namespace, it runs."""
    name, piece_name = piece.split(".")
    found, imported = definitions(name)
    named = copy_line(found[piece_name]) or set()
    parts = {(name, piece_name)}
    for part in named:
        if part.startswith("data."):
            parts.add(("data", part.removeprefix("data.")))
        else:
            parts.add((name, part) if part in found else (imported.get(part, "common"), part))
    namespace = {"__name__": "copied", "types": types, "contextlib": contextlib}
    for file in ("common", "data", name):
        for node in tree(file).body:
            if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module not in ("common", "data")):
                if "data" not in {alias.name for alias in node.names}:
                    exec(ast.unparse(node), namespace)
    for file in dict.fromkeys(["data", "common", name]):
        for part, node in definitions(file)[0].items():
            if (file, part) in parts:
                exec(ast.get_source_segment(source(file), node) if not getattr(node, "decorator_list", None) else ast.unparse(node),
                     namespace)
        if file == "data" and name != "data":
            namespace["data"] = types.SimpleNamespace(**{part: namespace[part] for f, part in parts if f == "data"})
    exec(PIECES[piece], namespace)


# ------------------------------------------------------------------------------------ what is imported


def imports(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports(path):
    """Four packages and no more; a model script never takes from another one, common and data from none."""
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "tqdm"}
    if path.stem in MODELS:
        allowed |= {"common", "data"}
    elif path.parent.name == "tests":
        allowed |= {"pytest", "conftest", "common", "data", *MODELS}
        peers = {"timm", "transformers", "src", "loss", "models", "models_mae", "samplers"}  # last five: the authors'
        allowed |= peers if path.stem in ("benchmark", "agreement") else set()
    assert set(imports(path)) <= allowed


def test_nothing_happens_at_import():
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf8")).body:
            if isinstance(node, ast.Assign):  # of constants; a row of SIZES may be computed
                calls = [ast.unparse(n.func) for n in ast.walk(node.value) if isinstance(n, ast.Call)]
                assert set(calls) <= {"dict", "set", "paper_size"}, f"{path.name}:{node.lineno}"
            call = isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            loop = isinstance(node, (ast.For, ast.While, ast.With))
            guarded = isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
            assert not call and not loop and (guarded or not isinstance(node, ast.If)), f"{path.name}:{node.lineno}"


# ------------------------------------------------------------------------------------------ the README


def commands():
    """Every `python script.py ...` line in README, in the measurements, and in the scripts' docstrings."""
    texts = [README, MEASUREMENTS]
    texts += [ast.get_docstring(ast.parse(path.read_text(encoding="utf8"))) for path in ROOT.glob("*.py")]
    for line in "\n".join(texts).splitlines():
        for match in re.finditer(r"python ((?:tests/)?\w+\.py)((?: +[^#&|`]+)?)", line):
            yield match[1], match[2].split()


def test_commands_name_real_scripts_and_options():
    found = list(commands())
    assert len(found) >= 5
    for script, words in found:
        assert (ROOT / script).is_file(), script
        if script.startswith("tests/"):
            continue
        module = importlib.import_module(script[:-3])
        options = [word for word in words if word.startswith("--")]
        known = vars(module.parse_args([])) | {"help": True}
        for name in (word[2:].replace("-", "_") for word in options):
            assert {name, name.removeprefix("no_")} & set(known), (script, name)


def test_the_commands_for_a_gpu_are_understood():
    gpu = importlib.import_module("gpu")
    for commands in gpu.ITEMS.values():
        for text in commands.values():
            script, *words = text.format(out="out/gpu").split()
            importlib.import_module(script[:-3]).parse_args(words)


def test_options_in_the_readme_exist():
    """Also those that stand without their command: `--mask-ratio` belongs to some script."""
    known = {"help"}
    for name in MODELS:
        known |= set(vars(importlib.import_module(name).parse_args([])))
    by_hand = "".join(path.read_text(encoding="utf8") for path in ROOT.glob("tests/*.py"))
    text = re.sub(r"^```.*?^```", "", README + MEASUREMENTS, flags=re.DOTALL | re.MULTILINE)
    for option in set(re.findall(r"--([a-z][a-z-]+)", " ".join(re.findall(r"`([^`\n]*)`", text)))):
        key = option.replace("-", "_")
        assert {key, key.removeprefix("no_")} & known or f'"--{option}"' in by_hand, option


def test_files_in_the_readme_exist():
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r'src="([^":]+)"', README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([^)#:]+)\)", MEASUREMENTS):
        assert (ROOT / "tests" / path).exists(), path
    for script in re.findall(r"`(\w+\.py)", README + MEASUREMENTS):
        assert (ROOT / script).exists() or (ROOT / "tests" / script).exists(), script


def anchors(text):
    """What links to the headings of a Markdown text end with: "From slide to code" is from-slide-to-code."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]


def test_headings_in_links_exist():
    known = {"": anchors(README), "tests/measurements.md": anchors(MEASUREMENTS)}
    links = re.findall(r"\]\(([\w/.]*)#([\w-]+)\)", README)
    links = [(path, anchor) for path, anchor in links if not path.endswith(".py")]  # those name lines
    assert len(links) >= 4
    for path, anchor in links:
        assert anchor in known[path], anchor


def assigned(node):
    return ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else None


def test_functions_in_the_readme_exist():
    """`vit.py: ViT.tokens` names a script and what stands in it."""
    for script, name in re.findall(r"`(\w+)\.py: ([\w.]+)`", README):
        assert line_of(script, name) > 0


def line_of(script, name):
    """The line at which `ViT.embed` of a script starts."""
    body = tree(script).body
    for part in name.split("."):
        node = next((n for n in body if part in (getattr(n, "name", None), assigned(n))), None)
        assert node is not None, f"{script}.py has no {name}"
        body = getattr(node, "body", [])
    return node.lineno


def with_true_lines(text):
    """README with the line of each linked function, and the length of each script, as they are now."""

    def link(match):
        script = match[1]
        name = match[2]
        return f"[`{script}.py: {name}`]({script}.py#L{line_of(script, name)})"

    def length(match):
        count = len((ROOT / match[1]).read_text(encoding="utf8").splitlines())
        return f"{match[1]}{match[2]}{count}"

    text = re.sub(r"\[`(\w+)\.py: ([\w.]+)`\]\(\w+\.py#L\d+\)", link, text)
    return re.sub(r"\b(\w+\.py)( +)\d+", length, text)


def test_lines_in_the_readme_are_true():
    """If not: `PYTHONPATH=. python tests/test_repository.py` writes them anew."""
    assert len(re.findall(r"\.py#L\d", README)) > 40
    assert len(re.findall(r"\b\w+\.py +\d", README)) == 8
    expected = with_true_lines(README).splitlines()
    for line, true_line in zip(README.splitlines(), expected, strict=True):
        assert line == true_line


def paragraphs(text):
    """Paragraphs and list items, without tables and code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = text.split("\nPapers: ")[0]
    for line in text.splitlines():  # each paragraph is one line
        if line and line[0] not in "|#<!" and not line.startswith("    "):
            yield re.sub(r"^(\d+\.|-) ", "", line)


def test_paragraphs_of_the_readme_are_short():
    """A reader takes in sixty words and four numbers at once, not more."""
    found = list(paragraphs(README))
    assert len(found) > 50
    for paragraph in found:
        words = re.sub(r"`[^`]*`|\]\([^)]*\)", " code ", paragraph)  # code and the target of a link
        numbers = re.findall(r"(?<![\w.])\d[\d.,:]*", words)
        assert len(words.split()) <= 60, paragraph
        assert len(numbers) <= 4, (numbers, paragraph)


def snippet(first_line):
    """The code block of README that begins with this line."""
    return next(block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if block.startswith(first_line))


def test_own_pictures_as_the_readme_says(tmp_path, monkeypatch):
    """A folder of pictures becomes an .npz, a model is trained on it and names a picture: with the code printed there."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed, and the repository does not need it")
    monkeypatch.chdir(tmp_path)
    files = ["dog/a.jpg", "dog/b.JPG", "cat/c.jpeg", "cat/d.PNG", "bird/e.png"]
    gray = np.zeros((40, 80, 3), np.uint8)
    gray[:, :40] = 200  # the left half is light
    for i in range(5):
        for name in files:
            path = tmp_path / "photos" / name.replace(".", f"{i}.")
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(gray).save(path)
    exif = image.Exif()
    exif[274] = 6  # to be turned by a quarter
    image.fromarray(gray).save("photos/dog/turned.jpg", exif=exif)
    image.fromarray(np.full((50, 50), 100 * 256, np.uint16)).save("photos/cat/deep.png")  # 16 bits
    (tmp_path / "photos" / "cat" / "notes.txt").touch()
    space = {}
    exec(snippet("import pathlib"), space)
    arrays = np.load("photos.npz")
    assert arrays["images"].shape == (27, 64, 64, 3) and arrays["class_names"].tolist() == ["bird", "cat", "dog"]
    found = dict(zip((path.name for path in space["files"]), arrays["images"]))
    assert (found["deep.png"] == 100).all()
    assert found["turned.jpg"][:30].min() > 150 and found["turned.jpg"][34:].max() < 50  # light above
    assert found["a0.jpg"][:, :30].min() > 150 and found["a0.jpg"][:, 34:].max() < 50

    vit = importlib.import_module("vit")
    vit.train(vit.parse_args(["--data", "photos.npz", "--steps", "2", "--device", "cpu", "--patch-size", "16"]))
    image.fromarray(gray).save("photo.jpg")
    exec(snippet("import data, torch, vit").split("\n\n")[0], space)
    x = data.normalize(torch.tensor(space["read"]("photo.jpg", 64)).permute(2, 0, 1)[None], space["args"]["mean"],
                       space["args"]["std"])
    assert (x == space["x"]).all() and space["args"]["class_names"] == ["bird", "cat", "dog"]


def test_readme_is_short_and_sets_up_twice():
    assert len(README.splitlines()) < 300
    assert len(re.findall(r"pip install -r requirements.txt &&", README)) == 2  # the main job, and the tests
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf8")
    assert "README.md" in ci  # which runs the test command from there, as written


def test_every_file_can_be_read_by_python_3_10():
    for path in FILES:
        ast.parse(path.read_text(encoding="utf8"), feature_version=(3, 10))


def test_requirements():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf8").split("\n")
    assert {re.match(r"\w*", line)[0] for line in lines} - {""} == {"torch", "numpy", "tqdm", "pytest"}
    assert next(line for line in lines if line.startswith("torch")) == "torch>=2.5,<=2.13.0"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_true_lines(README), encoding="utf8")
