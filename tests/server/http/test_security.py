"""What the whole code base must never do, and what no error body may say."""

import ast
import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from medusa_core.errors import MedusaError
from medusa_core.model_info import ModelInfo
from medusa_core.text.tokenizer import load_chat_tokenizer
from server import errors
from server.app import create_app
from server.errors import ApiError
from server.pipeline.prompts import PromptBuilder
from server.schemas.chat import ChatRequest
from server.settings import Settings

ROOT = Path(__file__).parents[3]
SOURCES = [path for package in ("medusa_core", "server") for path in sorted((ROOT / package).rglob("*.py"))]

FORBIDDEN_IMPORTS = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle", "xmlrpc"}
ALLOWED_OF_PICKLE = {"UnpicklingError"}
ALLOWED_OF_MULTIPROCESSING = {
    "get_context",  # spawn: the arguments of a worker are pickled by us, for our own child
    "Pipe",
    "Process",
    "connection",
    "parent_process",
    "Connection",
    "wait",
}
# `send` and `recv` of a connection pickle, `send_bytes` and `recv_bytes` do not.
OBJECT_CALLS = {"send", "recv", "Queue", "Manager", "Pool", "SharedMemory"}
LEAKS = re.compile(r"Traceback|File \"|\.py\b|site-packages|/(root|home|usr|opt|tmp|work|var|etc|proc)\b")


def imported_names(tree):
    """(module, name) of each import; the name is None for `import module`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def dotted(node):
    """`a.b.c` of an expression, or "" for what has no such name."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield dotted(node.func), {word.arg: word.value for word in node.keywords}


def is_constant(node, value):
    return isinstance(node, ast.Constant) and node.value is value


def unsafe(source):
    """What a file does that could run code out of data, each as a short text."""
    tree = ast.parse(source)
    imports = list(imported_names(tree))
    has_pipes = any(module.startswith("multiprocessing") for module, _ in imports)
    names = [dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    return [
        *(f"import {module} {name}" for module, name in imports if is_unsafe_import(module, name)),
        *(name for name in names if name.startswith("pickle.") and name[7:] not in ALLOWED_OF_PICKLE),
        *(name for name, words in calls(tree) if is_unsafe_call(name, words, has_pipes)),
    ]


def is_unsafe_import(module, name):
    top = module.partition(".")[0]
    if top in ("pickle", "_pickle"):
        return name not in {None, *ALLOWED_OF_PICKLE}
    if top == "multiprocessing":
        return name not in {None, *ALLOWED_OF_MULTIPROCESSING}
    return top in FORBIDDEN_IMPORTS


def is_unsafe_call(name, words, has_pipes):
    last = name.rpartition(".")[2]
    is_loader = name.startswith("Auto") and last in ("from_pretrained", "from_config")
    wanted = {"trust_remote_code": False} if is_loader or "trust_remote_code" in words else {}
    if name == "torch.load":
        wanted["weights_only"] = True
    if "allow_pickle" in words:
        wanted["allow_pickle"] = False
    return (
        name in ("eval", "exec", "compile", "__import__")
        or (has_pipes and "." in name and last in OBJECT_CALLS)
        or not all(is_constant(words.get(word), value) for word, value in wanted.items())
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_code_out_of_data(path):
    assert unsafe(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(x)",
        "from pickle import loads",
        "import pickle\nload = pickle.Unpickler",
        "import marshal",
        "from dill import load",
        "import shelve",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=flag)",
        "from multiprocessing import Queue",
        "from multiprocessing.managers import BaseManager",
        "import multiprocessing\nmultiprocessing.Queue()",
        "import multiprocessing\n_context.Manager()",
        "from multiprocessing.connection import Connection\nconnection.send(x)",
        "from multiprocessing.connection import Connection\nself._connection.recv()",
        "AutoConfig.from_pretrained(m, trust_remote_code=True)",
        "AutoConfig.from_pretrained(m, trust_remote_code=settings.trust)",
        "AutoModelForCausalLM.from_pretrained(m)",
        "numpy.load(f, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert unsafe(source) != []


def test_servers_listen_on_loopback_unless_told(monkeypatch):
    monkeypatch.delenv("MEDUSA_HOST", raising=False)
    assert Settings().host == "127.0.0.1"
    for path in SOURCES:
        assert not re.search(r"['\"](0\.0\.0\.0|::)['\"]", path.read_text(encoding="utf-8")), path


def all_routes(router):
    """(path, methods) of every route, also of those that the schema leaves out."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from all_routes(inner)
        else:
            yield route.path, route.methods


def send_all(app, requests, **options):
    """Answers of an app that has not been started, so that everything is refused sooner or later."""

    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", **options) as client:
            return [await client.request(*request[:2], **dict(request[2:])) for request in requests]

    return asyncio.run(go())


def test_every_route_but_liveness_needs_a_key():
    app = create_app(Settings(api_keys="sk-0123456789abcdef"))
    routes = [(method, path.replace("{model:path}", "x")) for path, ms in all_routes(app) for method in ms]
    assert {path for _, path in routes} >= {
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models/x",
        "/ready",
        "/health",
        "/metrics",
        "/docs",
        "/openapi.json",
    }
    for (method, path), answer in zip(routes, send_all(app, routes), strict=True):
        assert answer.status_code == (200 if path == "/health" else 401), (method, path)
    key = {"authorization": "Bearer sk-0123456789abcdef"}
    assert all(answer.status_code != 401 for answer in send_all(app, routes, headers=key))


def test_no_error_says_where_things_lie():
    """Refusals of every kind, and crashes whose own text tells everything."""
    app = create_app(Settings(max_body_bytes=2048, max_header_bytes=1024))

    @app.get("/crash")
    async def crash():
        raise RuntimeError(f'File "{__file__}", line 1: /root/secret')

    @app.get("/refuse")
    async def refuse():
        raise MedusaError("/root/secret")

    chat = "/v1/chat/completions"
    good = {"model": "medusa-demo", "messages": [{"role": "user", "content": "x"}]}
    requests = [
        ("GET", "/crash"),
        ("GET", "/refuse"),
        ("GET", "/nowhere"),
        ("DELETE", chat),
        ("POST", chat, ("json", good)),  # the model is not there
        ("POST", chat, ("json", good | {"model": "../../secret"})),
        ("POST", chat, ("json", good | {"messages": 7})),
        ("POST", chat, ("json", good | {"temperature": "hot"})),
        ("POST", chat, ("json", good | {"speculation": {"mode": "x"}})),
        ("POST", chat, ("json", good | {"unknown": 1})),
        ("POST", chat, ("content", b"{")),
        ("POST", chat, ("content", b"\xff")),
        ("POST", chat, ("content", b"[" * 1500), ("headers", {"content-type": "application/json"})),
        ("POST", chat, ("content", b" " * 3000)),
        ("GET", "/v1/models/nobody"),
        ("GET", "/health", ("headers", {"x": "y" * 2000})),
    ]
    answers = send_all(app, requests)
    assert {answer.status_code for answer in answers} == {400, 404, 405, 413, 431, 500, 503}
    for answer in answers:
        assert set(json.loads(answer.content)["error"]) == {"message", "type", "param", "code"}
        assert answer.headers["x-request-id"]
        assert not LEAKS.search(answer.text), answer.text


def test_readiness_says_why_without_saying_where():
    app = create_app(Settings())
    app.state.runtime.start_error = MedusaError(
        "cannot load /work/models/vicuna-7b: /tmp/a/b.bin: no such file"
    )
    [answer] = send_all(app, [("GET", "/ready")])
    assert answer.status_code == 503
    assert answer.json()["reason"] == "cannot load vicuna-7b: b.bin: no such file"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("heads org/model are not there", "heads org/model are not there"),
        ("'/a/b/c' holds no model", "'c' holds no model"),
        ("1/2 of /data/x y", "1/2 of x y"),
        ("https://hub.example/org/model", "https://hub.example/org/model"),
    ],
)
def test_paths_are_cut_to_names(text, expected):
    assert errors.without_paths(text) == expected


TEMPLATES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].system('id') }}",
    "{% set x = messages.append(1) %}",
    "{{ '%s'|format(x=messages.__class__.__base__) }}{{ raise_exception('stop') }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{% include '/etc/passwd' %}",
]


def make_builder(model_dir, executor, template, tmp_path, timeout=30.0):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    info = ModelInfo(
        model="m",
        heads=None,
        num_heads=0,
        parameters=1,
        context_length=512,
        vocab_size=320,
        dtype="float32",
        device="cpu",
        tree_nodes=1,
        trees=(),
        sources=(),
        slots=1,
    )
    return PromptBuilder(
        chat=load_chat_tokenizer(model_dir, str(path)),
        info=info,
        settings=Settings(request_timeout=timeout),
        executor=executor,
    )


BODY = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "hi"}]})


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_stay_in_their_sandbox(tiny_model_dir, tmp_path, template):
    with ThreadPoolExecutor(1) as executor:
        builder = make_builder(tiny_model_dir, executor, template, tmp_path)
        with pytest.raises(ApiError) as caught:
            asyncio.run(builder.prepare(BODY, "chatcmpl-1"))
    assert (caught.value.status, caught.value.detail.param) == (400, "messages")
    assert not LEAKS.search(caught.value.detail.message.replace("/etc/passwd", ""))


def test_filters_do_not_leave_the_sandbox_either(tiny_model_dir, tmp_path):
    with ThreadPoolExecutor(1) as executor:
        builder = make_builder(
            tiny_model_dir, executor, "{{ messages[0].content }}{{ ''|attr('__class__') }}", tmp_path
        )
        ids = asyncio.run(builder.prepare(BODY, "chatcmpl-1")).prompt_ids
    assert builder.chat.decode(ids) == "hi"


def test_a_template_that_loops_holds_up_nobody_for_ever(tiny_model_dir, tmp_path):
    """Its thread cannot be stopped, but its request ends, and the event loop goes on meanwhile."""
    loop = "{% for a in range(2000) %}{% for b in range(1500) %}{% endfor %}{% endfor %}"
    loop = "{{ messages[0].content }}{% if messages[0].content == 'hi' %}" + loop + "{% endif %}"
    with ThreadPoolExecutor(1) as executor:
        builder = make_builder(tiny_model_dir, executor, loop, tmp_path, timeout=0.01)
        with pytest.raises(ApiError) as caught:
            asyncio.run(builder.prepare(BODY, "chatcmpl-1"))
    assert (caught.value.status, caught.value.detail.code) == (503, "prompt_timeout")
