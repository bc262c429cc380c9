"""Contracts 1, 2, 3, 4, 5, 6 and 10: the teacher over the student's K/V, for every family."""

from __future__ import annotations

import copy

import pytest
import torch
from hf_pairs import WRITERS
from pairs import random_batch, weights
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import rotate_half

from ldistill.distill.attention import recording
from ldistill.distill.distiller import Distiller, student_inputs
from ldistill.distill.objective import COLUMNS, Objective
from ldistill.distill.targets import queries_for
from ldistill.distill.teacher import Teacher
from ldistill.models.pair import load_pair
from ldistill.models.parts import train_only

FAMILIES = ["nanovlm", "llava", "smolvlm", "llava-mistral", "llava-qwen2"]
# No line of the library knows these decoders: q and k normed, norms behind, layers without RoPE.
OTHERS = ["llava-qwen3", "llava-olmo2", "llava-smollm3"]


@pytest.fixture(scope="module", params=FAMILIES)
def any_pair_root(request, tmp_path_factory):
    """A pair of each family, whose student and teacher differ.

    Contracts of the model hold for every family; what lies around it is tested on one.
    """
    root = tmp_path_factory.mktemp(request.param)
    WRITERS[request.param](root)
    return root


@pytest.fixture(scope="module", params=FAMILIES + OTHERS)
def any_same_pair_root(request, tmp_path_factory):
    """A pair of each family, whose teacher has the student decoder's weights."""
    root = tmp_path_factory.mktemp(f"same_{request.param}")
    WRITERS[request.param](root, same_weights=True)
    return root


# Every document has room for LLaVA's 16 image tokens.
ROWS = [[24, 31], [40], [30, 26]]


def load(root, **kwargs):
    pair = load_pair(str(root / "student"), str(root / "teacher"))
    train_only(pair.student)
    return Distiller(pair.student, Teacher(pair.lm), kwargs.pop("weights", weights()), **kwargs)


def run(distiller, batch, total=None):
    supervision = distiller.supervise(batch)
    total = total or len(supervision.targets)
    return distiller(batch, supervision, total, len(supervision.queries) > 0)


def column(metrics, name):
    return metrics[:, COLUMNS.index(name)]


def dense_teacher_logits(distiller, batch, scope):
    """Independent reference: every position of every document, naive loops over heads, fp64."""
    student, lm = copy.deepcopy(distiller.student), copy.deepcopy(distiller.teacher.lm).double()
    from ldistill.distill.attention import attach

    slots = attach(student.backbone)
    with torch.no_grad(), recording(slots) as recorded:
        student(**student_inputs(batch))
        shared = recorded()
    vocab = lm.config.vocab_size
    ids, labels = batch["input_ids"], batch["labels"]
    answer = torch.zeros_like(ids, dtype=torch.bool)
    answer[:, 1:] = labels[:, :-1] != -100
    own = {
        "full": torch.zeros_like(answer),
        "prompt": answer,
        "visual": ids < vocab,
        "own": ids < vocab,
    }[scope]
    hidden_from_all = scope == "own"
    out = {}
    for b, start, length in zip(
        batch["doc_batch"].tolist(), batch["doc_start"].tolist(), batch["doc_length"].tolist()
    ):
        span = slice(start, start + length)
        with torch.no_grad():
            x = lm.model.embed_tokens(ids[b, span].clamp(max=vocab - 1))
            cos, sin = lm.model.rotary_emb(x, batch["position_ids"][b, span][None])
            cos, sin = cos[0].double(), sin[0].double()
            for index, layer in enumerate(lm.model.layers):
                att = layer.self_attn
                h = layer.input_layernorm(x)
                q, k, v = (
                    p(h).view(length, -1, att.head_dim)
                    for p in (att.q_proj, att.k_proj, att.v_proj)
                )
                q, k = (t * cos[:, None] + rotate_half(t) * sin[:, None] for t in (q, k))
                ks = shared.keys[index][b, :, span].transpose(0, 1).double()
                vs = shared.values[index][b, :, span].transpose(0, 1).double()
                mine = own[b, span]
                k = torch.where(mine[:, None, None], k, ks)
                v = torch.where(mine[:, None, None], v, vs)
                group = q.shape[1] // k.shape[1]
                heads = []
                for head in range(q.shape[1]):
                    score = q[:, head] @ k[:, head // group].T * att.head_dim**-0.5
                    allowed = torch.ones(length, length).tril().bool()
                    if hidden_from_all:
                        allowed &= mine[None]
                    score = score.masked_fill(~allowed, -torch.inf)
                    heads.append(score.softmax(-1).nan_to_num() @ v[:, head // group])
                x = x + att.o_proj(torch.stack(heads, 1).flatten(1))
                x = x + layer.mlp(layer.post_attention_layernorm(x))
            logits = lm.lm_head(lm.model.norm(x))
        for i in range(length):
            out[(b, start + i)] = logits[i]
    return out


@pytest.mark.parametrize("scope", ["full", "prompt", "visual", "own"])
@pytest.mark.parametrize("turns", [1, 2])
def test_queries_are_exact(any_pair_root, scope, turns):
    """Contract 2: the queries alone give the logits that all positions give."""
    distiller = load(any_pair_root, kv_scope=scope)
    batch = random_batch(distiller.student, ROWS, turns=turns)
    reference = dense_teacher_logits(distiller, batch, scope)
    supervision = distiller.supervise(batch)
    wanted = supervision.targets.flat[supervision.targets.taught]
    rows = queries_for(batch, wanted, scope, distiller.known)
    with torch.no_grad(), recording(distiller.slots) as recorded:
        distiller.student(**student_inputs(batch))
        hidden = distiller.teacher.hidden(rows, recorded())
    logits = distiller.teacher.head(hidden, F.linear)
    seq = batch["input_ids"].shape[1]
    expected = torch.stack([reference[divmod(int(f), seq)] for f in wanted]).float()
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def test_the_blind_teacher_on_text_is_the_lm_itself(any_pair_root):
    """`own` on documents without pictures: the plain KL to the LM's own forward, in nats."""
    everywhere, objective = weights(alpha=(1.0, 1.0), temperature=1.0), Objective(t_squared=False)
    distiller = load(any_pair_root, kv_scope="own", weights=everywhere, objective=objective)
    batch = random_batch(distiller.student, ROWS, images=False)
    lm, student, total = copy.deepcopy(distiller.teacher.lm), distiller.student.eval(), 0.0
    lm.config._attn_implementation = "eager"
    places = zip(*(batch[f"doc_{key}"].tolist() for key in ("batch", "start", "length")))
    for b, start, length in places:
        span = slice(start, start + length)
        ids, labelled = batch["input_ids"][b, span][None], batch["labels"][b, span] != -100
        with torch.no_grad():
            z_t = lm(ids).logits[0, labelled].double()
            z_s = student.lm_head(student(ids))[0, labelled, : z_t.shape[1]].double()
        p, q = z_t.log_softmax(-1), z_s.log_softmax(-1)
        total += float((p.exp() * (p - q)).sum())
    loss = run(distiller, batch, total=1.0)["loss"]
    assert float(loss) == pytest.approx(total, rel=1e-4)


def test_identity(any_same_pair_root):
    """Contract 1: equal weights give equal logits at every target, and KL 0."""
    distiller = load(any_same_pair_root, weights=weights(alpha=(0.5, 0.5)))
    batch = random_batch(distiller.student, ROWS)
    supervision = distiller.supervise(batch)
    with torch.no_grad(), recording(distiller.slots) as recorded:
        hidden = distiller.student(**student_inputs(batch))
        mine = distiller.teacher.hidden(supervision.queries, recorded())
    z_s = distiller.student.lm_head(hidden.flatten(0, 1)[supervision.targets.flat])
    z_t = distiller.teacher.head(mine, F.linear)
    assert len(z_t) == len(supervision.targets) > 25
    torch.testing.assert_close(z_t, z_s[:, : z_t.shape[1]], atol=2e-5, rtol=2e-5)
    metrics = run(distiller, batch)["metrics"]
    assert column(metrics, "kl").abs().max() < 1e-4
    assert torch.equal(column(metrics, "teacher_student"), column(metrics, "kd_rows"))


def test_shared_kv_are_views(any_pair_root):
    """Contract 3: the shared K/V are the student's projections' storage; nothing is repeated."""
    distiller = load(any_pair_root)
    batch = random_batch(distiller.student, ROWS)
    values = []
    for layer in distiller.student.backbone.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda m, i, o: values.append(o))
    with recording(distiller.slots) as recorded:
        distiller.student(**student_inputs(batch))
        shared = recorded()
    config = distiller.student.backbone.config
    assert len(shared.values) == config.num_hidden_layers
    for made, kept in zip(values, shared.values):
        assert kept.data_ptr() == made.data_ptr()
        assert kept.shape[1] == config.num_key_value_heads
    detached = shared.detach()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(shared.keys, detached.keys))
    assert all(slot.key is None and not slot.active for slot in distiller.slots)


def test_selectivity(any_pair_root):
    """Contract 5: targets with α = 0 never enter the teacher."""
    distiller = load(any_pair_root)
    batch = random_batch(distiller.student, ROWS)
    supervision = distiller.supervise(batch)
    on_language = supervision.targets.source == 0
    assert 0 < len(supervision.queries) == int(on_language.sum()) < len(supervision.targets)
    seen = []
    distiller.teacher.lm.model.embed_tokens.register_forward_hook(
        lambda m, inputs, o: seen.append(inputs[0].numel())
    )
    metrics = run(distiller, batch)["metrics"]
    assert seen == [len(supervision.queries)]
    assert column(metrics, "kd_rows").tolist() == [len(supervision.queries), 0]
    none = load(any_pair_root, weights=weights(alpha=(0.0, 0.0)))
    none.teacher.lm.model.embed_tokens.register_forward_hook(lambda *_: pytest.fail("ran"))
    run(none, batch)


def test_nothing_leaks_between_documents(any_pair_root):
    """Contract 6: changing one document changes no other's student or teacher states."""
    distiller = load(any_pair_root, weights=weights(alpha=(0.5, 0.5)))
    batch = random_batch(distiller.student, ROWS)
    other = copy.deepcopy(batch)
    second = (batch["document_ids"] == 1) & (batch["input_ids"] < 320)
    other["input_ids"][second] = (other["input_ids"][second] + 7) % 300 + 3
    states = []
    for b in (batch, other):
        supervision = distiller.supervise(batch)
        rows = distiller.supervise(b).queries
        with torch.no_grad(), recording(distiller.slots) as recorded:
            hidden = distiller.student(**student_inputs(b))
            states.append((hidden.flatten(0, 1), distiller.teacher.hidden(rows, recorded())))
    untouched = batch["document_ids"].flatten() != 1
    torch.testing.assert_close(states[0][0][untouched], states[1][0][untouched])
    same = untouched[supervision.targets.flat]
    torch.testing.assert_close(states[0][1][same], states[1][1][same])
    assert not torch.allclose(states[0][1][~same], states[1][1][~same])


def reference_gate(kind, z_t, label):
    p = F.softmax(z_t, -1)
    if kind == "none":
        return 1.0
    if kind == "confidence":
        return p.max()
    return p[label] / p.max() if label < len(p) else 0.0


def reference_loss(distiller, batch, total, mix="convex", t_squared=True, gate="none", tau=4.0):
    """fp64, materialised, straight from the definition; teacher logits as constants."""
    student = copy.deepcopy(distiller.student).double()
    pixels = batch["pictures"]["pixel_values"]
    logits = student.lm_head(
        student(batch["input_ids"], batch["position_ids"], {"pixel_values": pixels.double()})
    )
    teacher = dense_teacher_logits(distiller, batch, distiller.kv_scope)
    loss = 0
    for b, start, length, source in zip(
        *(batch[f"doc_{k}"].tolist() for k in ("batch", "start", "length", "source"))
    ):
        alpha = distiller.weights.alpha[source]
        for i in range(start, start + length):
            label = int(batch["labels"][b, i])
            if label == -100:
                continue
            z_s, z_t = logits[b, i], teacher[(b, i)]
            ce = -F.log_softmax(z_s, -1)[label]
            p, q = F.log_softmax(z_t / tau, -1), F.log_softmax(z_s[: len(z_t)] / tau, -1)
            kl = (p.exp() * (p - q)).sum() * (tau**2 if t_squared else 1)
            a = alpha * reference_gate(gate, z_t, label)
            loss = loss + ((1 - a) if mix == "convex" else 1) * ce + a * kl
    return loss / total, student


@pytest.mark.parametrize(("scope", "mix", "t_squared", "gate"), [
    ("full", "convex", True, "none"),
    ("prompt", "additive", True, "none"),
    ("visual", "convex", False, "none"),
    ("full", "convex", True, "agreement"),
    ("full", "additive", False, "confidence"),
])  # fmt: skip
def test_loss_and_gradients_match_the_definition(pair_root, scope, mix, t_squared, gate):
    objective = Objective(combine=mix, t_squared=t_squared, gate=gate)
    distiller = load(pair_root, kv_scope=scope, objective=objective)
    batch = random_batch(distiller.student, ROWS)
    total = 77.0
    expected, student = reference_loss(distiller, batch, total, mix, t_squared, gate)
    expected.backward()
    outputs = run(distiller, batch, total)
    loss = outputs["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    logged = outputs["metrics"][:, COLUMNS.index("loss")].sum() / total
    assert logged.item() == pytest.approx(expected.item(), rel=1e-4)
    compared = 0
    for (name, p), (_, r) in zip(distiller.student.named_parameters(), student.named_parameters()):
        if p.requires_grad:
            assert p.grad is not None, name
            scale = r.grad.abs().max().item() + 1e-6
            assert (p.grad - r.grad).abs().max().item() < 2e-3 * scale, name
            compared += 1
    assert compared > 20


def test_loss_and_gradients_match_the_definition_for_every_family(any_pair_root):
    test_loss_and_gradients_match_the_definition(any_pair_root, "full", "convex", True, "none")


def test_loss_and_gradients_do_not_depend_on_the_cut(any_pair_root):
    """Contract 4: one batch of packed rows, a row at a time, and one document a row."""
    results = []
    for cut in ("whole", "rows", "documents"):
        distiller = load(any_pair_root)
        batch = random_batch(distiller.student, ROWS)
        total = len(distiller.supervise(batch).targets)
        parts = [batch] if cut == "whole" else list(cut_batch(batch, cut))
        loss = 0.0
        for part in parts:
            output = run(distiller, part, total)["loss"]
            output.backward()
            loss += output.item()
        grads = {n: p.grad for n, p in distiller.student.named_parameters() if p.requires_grad}
        results.append((loss, grads, len(parts)))
    assert [r[2] for r in results] == [1, 3, 5]
    for loss, grads, _ in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        for name, grad in grads.items():
            reference = results[0][1][name]
            bound = 1e-4 * reference.abs().max().item() + 1e-6
            assert (grad - reference).abs().max().item() < bound, name


def cut_batch(batch, by):
    """The same documents in batches of one row: packed as they were, or alone."""
    table = zip(*(batch[f"doc_{k}"].tolist() for k in ("batch", "start", "length")))
    for number, (b, start, length) in enumerate(table):
        span = slice(start, start + length)
        if by == "rows":
            if start:
                continue
            docs = batch["doc_batch"] == b
            span = slice(None)
        else:
            docs = torch.arange(len(batch["doc_batch"])) == number
        part = {k: batch[k][b : b + 1, span] for k in ("input_ids", "position_ids", "labels")}
        part["document_ids"] = batch["document_ids"][b : b + 1, span]
        part |= {k: v[docs] for k, v in batch.items() if k.startswith("doc_")}
        part["doc_batch"] = torch.zeros_like(part["doc_batch"])
        if by == "documents":
            part["document_ids"] = torch.zeros_like(part["document_ids"])
            part["doc_start"] = torch.zeros_like(part["doc_start"])
        yield part | {"pictures": {"pixel_values": batch["pictures"]["pixel_values"][docs]}}


def test_kv_grad_through_reaches_the_student(pair_root):
    """With ``through`` the KL also reaches keys and values; the teacher stays frozen."""
    grads = {}
    for mode in ("detached", "through"):
        distiller = load(pair_root, kv_grad=mode)
        batch = random_batch(distiller.student, ROWS)
        run(distiller, batch)["loss"].backward()
        grads[mode] = distiller.student.backbone.layers[0].self_attn.k_proj.weight.grad
        assert all(p.grad is None for p in distiller.teacher.lm.parameters())
    assert not torch.allclose(grads["detached"], grads["through"], rtol=1e-2)


def test_kv_grad_through_by_finite_differences(pair_root):
    distiller = load(pair_root, kv_grad="through", weights=weights(alpha=(1.0, 1.0)))
    distiller.double()
    distiller.teacher.lm.double()
    batch = random_batch(distiller.student, [[20, 20]])
    batch["pictures"]["pixel_values"] = batch["pictures"]["pixel_values"].double()
    weight = distiller.student.backbone.layers[1].self_attn.v_proj.weight
    run(distiller, batch)["loss"].backward()
    grad = weight.grad.clone()
    torch.manual_seed(1)
    direction = torch.randn_like(weight)
    with torch.no_grad():
        values = []
        for step in (1e-3, -1e-3):  # norms compute in fp32: smaller steps drown in rounding
            weight += step * direction
            values.append(run(distiller, batch)["loss"].item())
            weight -= step * direction
    slope = (grad * direction).sum().item()
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(slope, rel=5e-3)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_attention_backends_agree(pair_root, backend):
    distiller = load(pair_root, attention=backend)
    loss = run(distiller, random_batch(distiller.student, ROWS))["loss"]
    reference = load(pair_root)
    expected = run(reference, random_batch(reference.student, ROWS))["loss"]
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing_changes_nothing(any_pair_root):
    grads = []
    for checkpointing in (False, True):
        distiller = load(any_pair_root)
        if checkpointing:
            distiller.activation_checkpointing_enable()
            distiller.train()
        run(distiller, random_batch(distiller.student, ROWS))["loss"].backward()
        grads.append(
            {n: p.grad for n, p in distiller.student.named_parameters() if p.requires_grad}
        )
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], msg=name)


def test_gradient_checkpointing_refuses_through(pair_root):
    with pytest.raises(ValueError, match="kv_grad"):
        load(pair_root, kv_grad="through").activation_checkpointing_enable()


def test_compiled_blocks_give_the_same_loss(pair_root):
    distiller = load(pair_root)
    batch = random_batch(distiller.student, ROWS)
    expected = run(distiller, batch)["loss"]
    expected.backward()
    grads = [p.grad.clone() for p in distiller.student.backbone.parameters()]
    distiller.zero_grad()
    torch._dynamo.reset()
    distiller.compile_blocks()
    loss = run(distiller, batch)["loss"]
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for grad, p in zip(grads, distiller.student.backbone.parameters()):
        torch.testing.assert_close(p.grad, grad, atol=1e-5, rtol=1e-3)


def test_no_targets_is_a_zero_loss(pair_root):
    distiller = load(pair_root)
    batch = random_batch(distiller.student, [[12]])
    batch["labels"].fill_(-100)
    loss = run(distiller, batch, total=10)["loss"]
    loss.backward()
    assert loss.item() == 0


def test_text_only_batch_trains_and_gives_the_projector_a_zero_gradient(any_pair_root):
    distiller = load(any_pair_root).train()
    batch = random_batch(distiller.student, ROWS, images=False)
    run(distiller, batch)["loss"].backward()
    for parameter in distiller.student.projector.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))


def test_distilling_without_a_teacher_is_refused(pair_root):
    pair = load_pair(str(pair_root / "student"), None)
    with pytest.raises(ValueError, match="teacher"):
        Distiller(pair.student, None, weights())
