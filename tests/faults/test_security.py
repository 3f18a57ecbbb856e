"""Nothing that is read is run; nothing is written outside; sizes are bounded before memory is."""

import ast
import functools
import json
import os
import pickle
import struct
import tarfile
import zipfile

import bombs
import fault_processes as fp
import numpy as np
import pytest
import sabotage

from lowdim_diffusion import generalization, training
from lowdim_diffusion.training import checkpoint
from lowdim_diffusion.training.rundir import RunDirectory, read_metrics

GIB = 2**30
BOUNDED = [functools.partial(sabotage.bounded_memory, GIB)]


# ---- what the code may not contain --------------------------------------------------------------

RUNS_CODE = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml", "torch.load"}
UNPACKS = {"extract", "extractall", "unpack_archive"}
RESTRICTED = "data/_cifar.py"  # an Unpickler that knows a few names and makes inert things of them


def sources():
    for room in ("lowdim_diffusion", "experiments", "benchmarks"):
        for path in sorted((fp.ROOT / room).rglob("*.py")):
            yield path.relative_to(fp.ROOT / room).as_posix(), ast.parse(path.read_text("utf-8"))


def complaints(name, tree):
    """What in a file could run what it reads, hand a string to a shell, or unpack an archive."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names]
            for module in modules:
                if (module or "").split(".")[0] in RUNS_CODE and name != RESTRICTED:
                    yield f"imports {module}"
        if isinstance(node, ast.Attribute) and name == RESTRICTED:
            if ast.unparse(node).startswith("pickle.") and node.attr[0].islower():
                yield f"uses {ast.unparse(node)}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rsplit(".", 1)[-1]
        if called in ("eval", "exec", "compile", "__import__") or last in UNPACKS:
            yield f"calls {called}"
        if called.startswith("os.") and last.startswith(("system", "popen", "exec", "spawn")):
            yield f"calls {called}"
        if last in (
            "getoutput",
            "getstatusoutput",
            "create_subprocess_shell",
            "from_yaml",
            "mktemp",
        ):
            yield f"calls {called}"
        if last == "deserialize" and name != "training/programs.py":  # jax.export's are programs
            yield f"calls {called}"
        if called in ("torch.load", "np.fromregex") or (
            last == "read_pickle" and name != RESTRICTED
        ):
            yield f"calls {called}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        for option in ("shell", "allow_pickle"):
            if option in given and getattr(given[option], "value", True) is not False:
                yield f"calls {called} with {option}={ast.unparse(given[option])}"


def test_no_code_runs_what_it_reads():
    found = [f"{name}: {what}" for name, tree in sources() for what in complaints(name, tree)]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from yaml import load",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=trusted)",
        "eval(text)",
        "os.system(f'cp {name}')",
        "subprocess.run(command, shell=True)",
        "tarfile.open(path).extractall(out)",
        "torch.load(path)",
        "export.deserialize(content)",
        "tyro.extras.from_yaml(Config, text)",
    ],
)
def test_the_search_finds_it(text):
    assert list(complaints("any.py", ast.parse(text)))
    assert not list(complaints("any.py", ast.parse("np.load(p, allow_pickle=False); run(['a'])")))


# ---- what commands do ---------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_and_its_samples_start_nothing_and_write_only_where_they_should(whole, tmp_path):
    log, run = tmp_path / "log", tmp_path / "run"
    watch = [functools.partial(sabotage.audit, log)]
    for steps in (10, 20):  # from nothing, and from a checkpoint
        fp.succeeds(fp.train(run, "--train.sample-every", "10", steps=steps, sabotage=watch))
    argv = ["sample", "--run", str(run), "--num-samples", "4", "--steps", "3", "--devices", "1"]
    assert fp.forked(*argv, sabotage=watch).finish().code == 0
    kinds = {line.split()[0] for line in log.read_text().splitlines()}
    assert kinds == {"write"}
    cache = os.environ["JAX_COMPILATION_CACHE_DIR"]
    written = {line.removeprefix("write ") for line in log.read_text().splitlines()}
    assert any(path.startswith(str(run)) for path in written)
    outside = [p for p in written if not p.startswith((str(run), cache, os.devnull))]
    assert not outside


@pytest.mark.slow
def test_names_never_reach_a_shell(tmp_path):
    name = "$(touch canary) `touch canary` ; touch canary & | > canary2 '\" *"
    run = tmp_path / name
    fp.succeeds(fp.train(run, steps=5, start=functools.partial(fp.command, cwd=tmp_path)))
    argv = ["sample", "--run", str(run), "--num-samples", "2", "--steps", "2", "--out", name]
    assert fp.command(*argv, cwd=tmp_path, env=fp.environment()).finish().code == 0
    done = fp.train(tmp_path / "other", "--data.path", f"no {name}", cwd=tmp_path)
    fp.fails_clearly(done, 2, "no such file or folder")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("canary")]


# ---- hostile files ------------------------------------------------------------------------------


class Trap:
    """Pickles to a call of ``touch canary``."""

    def __reduce__(self):
        return os.system, ("touch canary",)


def packed(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)


def traversing_tar(path):
    (path.parent / "evil").write_bytes(bytes(10))
    with tarfile.open(path, "w") as tar:
        tar.add(path.parent / "evil", "../../evil.png")
    (path.parent / "evil").unlink()


def traversing_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../evil.png", bytes(10))


DATA = {
    "bomb.npz": lambda path: bombs.zip_bomb(path, "x.npy", 2048, bombs.npy((2**28,))),
    "header.npy": lambda path: path.write_bytes(bombs.npy((2**40, 4))),
    "objects.npy": lambda path: np.save(path, np.array([Trap()]), allow_pickle=True),
    "data_batch_1": lambda path: path.write_bytes(pickle.dumps({"data": Trap()})),
    "x-idx3-ubyte": lambda path: path.write_bytes(b"\0\0\x08\x03" + b"\xff" * 12 + bytes(50)),
    "outside.tar": traversing_tar,
    "outside.zip": traversing_zip,
    "nan.npy": lambda path: np.save(path, np.array([[0, np.nan]])),
    "empty.npz": lambda path: path.touch(),
    "weights.pt": lambda path: packed(path, **{"archive/data.pkl": pickle.dumps(Trap())}),
}


@pytest.mark.slow
@pytest.mark.fault("F33")
@pytest.mark.parametrize("name", DATA)
def test_hostile_data_from_the_command_line(tmp_path, name):
    inside = tmp_path / "deep" / "er"
    inside.mkdir(parents=True)
    DATA[name](inside / name)
    before = {path for path in tmp_path.rglob("*")}
    done = fp.train("run", "--data.path", name, sabotage=BOUNDED, cwd=inside)
    fp.fails_clearly(done, 2, name)
    assert {path for path in tmp_path.rglob("*")} == before


def sparse(path):
    with open(path, "wb") as file:
        file.truncate(4 * GIB)


CONFIGS = {
    "tags": lambda path: path.write_text("!!python/object/apply:os.system ['touch canary']"),
    "aliases": lambda path: path.write_text("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"),
    "nested": lambda path: path.write_text("a = " + "[" * 100_000),
    "tables": lambda path: path.write_text("a = " + "{b = " * 10_000),
    "number": lambda path: path.write_text("seed = " + "9" * 100_000),
    "huge": sparse,
    "pickle": lambda path: path.write_bytes(pickle.dumps(Trap())),
    "nul": lambda path: path.write_text('out = "a\\u0000b"'),
    "misspelt": lambda path: path.write_text("[optim]\nlearning_rte = 1"),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.slow
@pytest.mark.fault("F32")
@pytest.mark.parametrize("name", CONFIGS)
def test_hostile_configs_from_the_command_line(tmp_path, name):
    path = tmp_path / f"{name}.toml"
    CONFIGS[name](path)
    for argv in (["train", "--config"], ["sweep", "--out", "s", "--file"]):
        done = fp.forked(*argv, path.name, sabotage=BOUNDED, cwd=tmp_path).finish()
        fp.fails_clearly(done, 2, "--out" if (name, argv[0]) == ("nul", "train") else path.name)
        assert os.listdir(tmp_path) == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "item, change, words",
    [
        ("meta", lambda c: c["fixed"]["model"].update(name="mlp", width=10**9), "parameters"),
        ("meta", lambda c: c["fixed"]["model"].update(name="mlp", depth=10**7), "parameters"),
        ("meta", lambda c: c["fixed"]["model"].update(data_shape=[8, 8, 2]), "parameters"),
        ("meta", lambda c: c["fixed"]["model"].update(name="os.system"), "unknown network"),
        ("meta", lambda c: c.pop("fixed"), "was not written by"),
        ("meta", lambda c: c.update(config=["touch canary"]), "was not written by"),
        ("meta", lambda c: c.update(config="a = " + "[" * 10_000), "not valid TOML"),
        ("leaves", lambda c: c["leaves"]["step"].update(shape=[10**9] * 3), "no usable checkpoint"),
    ],
)
def test_checkpoints_whose_digests_are_right_and_whose_words_are_not(half, item, change, words):
    """Whoever changes the words can compute their digest; sizes are still checked against bytes."""
    for step in (5, 10, 15):
        path = half / "checkpoints" / str(step) / item / "metadata"
        content = json.loads(path.read_text())["content"]
        change(content)
        path.write_text(json.dumps(checkpoint._seal(content)))
    argv = ["sample", "--run", str(half), "--num-samples", "4", "--devices", "1"]
    done = fp.forked(*argv).finish()
    fp.fails_clearly(done, 3 if "usable" in words else 2, words)


def test_nests_without_end_in_small_files(tmp_path):
    deep = "[" * 100_000
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + deep + '\n{"step": 2}\n')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}, {"step": 2}]
    (tmp_path / "versions.json").write_text(deep)
    with RunDirectory(tmp_path) as run:
        assert run.record_versions({"jax": "1"}) == ["versions.json could not be read"]


@pytest.mark.slow
def test_hostile_files_in_a_run_directory_become_notes(half):
    deep = "[" * 100_000
    for name in ("config.toml", "stats.jsonl", "checkpoints/15/leaves/metadata"):
        (half / name).write_text(deep)
    with open(half / "metrics.jsonl", "a") as file:
        file.write(deep + "\n")
    done = fp.forked("runs", str(half), sabotage=BOUNDED).finish()
    assert done.code == 0 and done.err.count("\n") == 1, done
    assert "config.toml is not valid TOML" in done.err and "stopped" in done.out


def test_bombs_among_features_and_chunks(tmp_path):
    bombs.zip_bomb(tmp_path / "f.npz", "train.npy", 2048, bombs.npy((2**14, 2**14)))
    with pytest.raises(ValueError, match="too large when decoded"):
        generalization.load_features(tmp_path / "f.npz")
    packed(tmp_path / "f.npz", samples=bombs.npy((2**40, 2**20)))
    with pytest.raises(ValueError, match="too large when decoded"):
        generalization.load_features(tmp_path / "f.npz")

    square = lambda point: point["a"] ** 2
    run = lambda: training.sweep(square, {"a": [1.0, 2.0]}, path=tmp_path / "s").values.tolist()
    assert run() == [1, 4]
    (chunk,) = (tmp_path / "s").glob("chunk-*.npz")
    bombs.zip_bomb(chunk, "leaf0.npy", 2048, bombs.npy((2**28,)))  # computed anew, not unfolded
    assert run() == [1, 4] and chunk.stat().st_size < 2000


def test_headers_of_weights_that_claim_too_much(tmp_path):
    import safetensors.numpy

    from lowdim_diffusion import networks

    path = tmp_path / "w.safetensors"
    claim = {"w": {"dtype": "F32", "shape": [2**40, 2**10], "data_offsets": [0, 2**52]}}
    header = json.dumps(claim).encode()
    for content in (
        struct.pack("<Q", 2**60) + bytes(64),
        struct.pack("<Q", len(header)) + header + bytes(64),
        struct.pack("<Q", 10**7) + b"[" * 10**7,
    ):
        path.write_bytes(content)
        for load in (networks.load_weights, networks.from_edm):
            with pytest.raises(ValueError, match="damaged"):
                load(path)
    saved = networks.save_weights(path, {"w": np.ones(2)}, {})
    deep = "[" * 100_000
    digest = networks.weights._digest(deep, {"w": np.ones(2)})
    metadata = {"about": deep, "sha256": digest}
    safetensors.numpy.save_file({"w": np.ones(2)}, saved, metadata=metadata)
    with pytest.raises(ValueError, match="cannot read about"):
        networks.load_weights(saved)
