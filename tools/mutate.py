"""Break the library on purpose, one line at a time, and check that the tests notice.

Run from anywhere: `python tools/mutate.py [words of a mutant's name]`. Every mutant changes text in a copy of `src`.
The tests named with it must fail on the changed copy and pass on the unchanged one. The exit code is 1 if a mutant
survives (or the tests fail without one), and 2 if its text does not occur in the source exactly once or pytest could
not run its tests. Needs a system that can fork.
"""

import os
import shutil
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch._dynamo  # noqa: F401  once, for all forks; the first optimizer would import it

ROOT = Path(__file__).resolve().parent.parent
WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    """One fault: pairs of text and replacement in a file, and the tests that must notice."""

    name: str
    file: str
    changes: list[tuple[str, str]]
    tests: str
    """Test file and an expression for `pytest -k`."""


CONTRACT, ENGINE, RULES = "test_contract.py", "test_engine.py", "test_rules.py"
SID, TRUNK = "test_sid.py", "test_trunk.py"
LOCAL = f"{CONTRACT} mlp and sll and (carries or reaches)"
MEMORY = f"{CONTRACT} working_memory and mlp and local_ce"
PIPE, PARTS = "test_pipeline.py", "test_distributed_checkpoint.py"
FREE = "        group.free()\n\n    def _step_optimizer"
AGAIN = '    seed_generators(derive_seed(setup.execution.seed, "evaluation"), setup.device)\n'
FOUND = "test_calls_found.py"
MUTANTS = [
    Mutant("blocks are not looked for in stages", "core/cut_names.py",
           [("        if not staged:\n", "        if True:\n")], f"{FOUND} stages"),
    Mutant("layers are looked into", "core/cut_names.py",
           [("(not _alike(lists, kinds) and any(", "(any(")], f"{FOUND} stages"),
    Mutant("the model's order in place of the calls'", "core/cut_names.py",
           [("lambda i: calls.ended.index(i) if", "lambda i: 0 if")], f"{FOUND} order_of_their_calls"),
    Mutant("the layer that gives the logits is a block", "core/cut_names.py",
           [("        order.pop()\n", "        break\n")], f"{FOUND} gives_the_outputs"),
    Mutant("what has no label counts in a mean", "core/tasks/classes.py",
           [("counts = y != UNLABELLED\n        weights", "counts = y == y\n        weights")],
           f"{FOUND} mean_over"),
    Mutant("a step keeps the sums of its blocks", "core/engine.py",
           [("trace.statistics.pop(name, None)", "trace.statistics.get(name)")], f"{FOUND} keeps_no_sums"),
    Mutant("finite gradients are judged by their norm", "core/engine.py",
           [("norm = replicas.norm(group.parameters) if clips else replicas.sum(group.parameters)",
             "norm = replicas.norm(group.parameters)")], f"{FOUND} norm_overflows"),
    Mutant("activation not detached", "core/engine.py",
           [("outputs.add(part, detach((out, message)))", "outputs.add(part, (out, detach(message)))")], LOCAL),
    Mutant("message not detached", "core/engine.py",
           [("outputs.add(part, detach((out, message)))", "outputs.add(part, (detach(out), message))")], LOCAL),
    Mutant("zero_grad before backward", "core/engine.py",
           [(FREE, "\n    def _step_optimizer"),
            ("loss = self._backward(group, h, signals, share)",
             "group.free(); loss = self._backward(group, h, signals, share)")], MEMORY),
    Mutant("gradients zeroed, not freed", "core/groups.py",
           [("        for parameter in self.parameters:\n            parameter.grad = None\n",
             "        for optimizer in self.optimizers:\n            optimizer.zero_grad(set_to_none=False)\n")],
           MEMORY),
    Mutant("one backward of all losses (memory)", "learner/build.py",
           [("groups_of(setup.rule, names)", "[range(len(blocks))]")], MEMORY),
    Mutant("one backward of all losses (locality)", "learner/build.py",
           [("groups_of(setup.rule, names)", "[range(len(blocks))]")],
           f"{CONTRACT} feel and sll"),
    Mutant("a fused step keeps its gradient", "core/engine.py",
           [("        parameter.grad = None\n        self._stepped.add", "        self._stepped.add")],
           "test_rivals.py one_gradient"),
    Mutant("a block at rest keeps its optimizer's state", "core/engine.py",
           [("                optimizer.state.clear()\n", "                pass\n")], "test_rivals.py keep_state"),
    Mutant("parameters at rest want gradients", "core/pullback.py",
           [("parameter.requires_grad_(False)", "parameter.requires_grad_(True)")],
           "test_rivals.py parameters_at_rest"),
    Mutant("both passes at the same side", "core/perturbation.py",
           [("for offset in (eps, -eps):", "for offset in (eps, eps):")], "test_rivals.py slope"),
    Mutant("a storage is moved as often as it is shown", "memory/activations.py",
           [("            return known\n", "            pass\n")], "test_rivals.py written_once"),
    Mutant("a subclass counts its nominal bytes", "memory/watching.py",
           [("        if is_traceable_wrapper_subclass(tensor):\n            inner",
             "        if False:\n            inner")], "test_subclasses.py counts_as"),
    Mutant("what is compiled stays refused", "memory/watching.py",
           [('set_stance("force_eager")', 'set_stance("default")')], "test_subclasses.py goes_on"),
    Mutant("a row keeps every output", "models/reversible.py",
           [("        row = Row.ending_with(x)", "        row = Row()")], "test_reversible.py do_not_grow"),
    Mutant("gradients for what lends its graph", "core/engine.py",
           [(", inputs=inputs)", ")")], f"{RULES} overlap_of_one"),
    Mutant("joined groups step one optimizer", "core/groups.py",
           [("for part in parts for optimizer in part.opt", "for part in parts[:1] for optimizer in part.opt")],
           "test_auxiliary_rules.py always_guided and mlp"),
    Mutant("the sampler's step is passed on in training", "rules/noprop.py",
           [("if ctx.training:\n            p", "if False:\n            p")], "test_noprop.py any_order"),
    Mutant("embeddings learn without the prior", "rules/noprop.py",
           [("signal.loss + prior_divergence(u[ctx.y], share).mean()", "signal.loss")],
           "test_noprop_embeddings.py head_moves"),
    Mutant("blocks keep their first embeddings", "rules/noprop.py",
           [("embedding(block).copy_(u)", "pass")], "test_noprop_embeddings.py copy_of_the_steps and dt"),
    Mutant("slope of the schedule loses a factor", "models/noprop.py",
           [("width * (b * a * at_t", "width * (b * at_t")], "test_noprop.py tells_its_slope"),
    Mutant("the velocity's way starts elsewhere", "rules/noprop.py",
           [('- ctx.message["origin"]', "")], "test_noprop.py perfect_velocity_costs"),
    Mutant("prediction in evaluation has other draws", "learner/prediction.py",
           [(AGAIN + "    if stage.first", "    if stage.first")],
           "test_noprop.py what_evaluation_reports and one_hot"),
    Mutant("the lending block's output is passed on", "core/runner.py",
           [("            if own:\n", "            if True:\n")], f"{RULES} overlap_of_one"),
    Mutant("the lending block's running statistics move", "core/runner.py",
           [("buffers = NOTHING if own and not aside else unit.on_copies()", "buffers = NOTHING")],
           "test_extra_passes.py sees_every_batch_once and interlocking"),
    Mutant("an extra pass has other draws than the step", "core/runner.py",
           [("    return self.run(unit, h, message, step, part)\n", "    return self.run(unit, h, message, None)\n")],
           "test_extra_passes.py what_they_think"),
    Mutant("an extra pass moves running statistics", "core/runner.py",
           [("preserved_generators(self.execution.device), unit.on_copies():",
             "preserved_generators(self.execution.device):")],
           "test_extra_passes.py sees_every_batch_once and layer_collaboration"),
    Mutant("a block that is linearised moves running statistics", "core/runner.py",
           [("unit.on_copies(), frozen:", "frozen:")],
           "test_extra_passes.py sees_every_batch_once and highway_backprop"),
    Mutant("the rounds of one batch count as updates", "learner/rounds.py",
           [("        built.engine.accumulation.updates -= 1\n", "")], "test_inference.py incremental"),
    Mutant("the second phase moves the same way", "rules/settling.py",
           [("sign[samples:] = -1", "sign[samples:] = 1")], "test_inference.py tends_to_the_gradient"),
    Mutant("feedback goes back through the weight", "rules/feedback.py",
           [("sent = signal if mixing is None else _mixed(ctx.layer, signal, mixing)\n"
             "        grad_x = _back(ctx.layer, x, sent, matrix)",
             "sent = signal if mixing is None else _mixed(ctx.layer, signal, mixing)\n"
             "        grad_x = _back(ctx.layer, x, signal, weight)")], "test_feedback.py closed_form"),
    Mutant("drtp knows no next token", "core/tasks/classes.py",
           [("(self.aligned(y) != UNLABELLED)[..., None]", "(y != UNLABELLED)[..., None]")],
           "test_feedback.py next_token"),
    Mutant("slopes of all samples are one", "core/perturbed_layers.py",
           [("slopes.to(call.direction.dtype).view(-1,", "slopes.mean().expand(slopes.shape).view(-1,")],
           "test_forward_only.py on_average"),
    Mutant("a smoothed label weighs once", "core/perturbed_layers.py",
           [("shares.sum(-1, keepdim=True) * z.softmax(-1) - shares", "z.softmax(-1) / len(z) - shares")],
           "test_forward_only.py error_at_the_outputs"),
    Mutant("the neighbour's gradient has the wrong weight", "core/chunked.py",
           [("return -log_bc, torch.full_like(log_bc, 0.5), r", "return -log_bc, torch.full_like(log_bc, 1.0), r")],
           "test_chunked.py divergence_of_a_neighbour"),
    Mutant("a separate head joins all the same", "rules/solo.py",
           [('join_head=self.head != "separate"', "join_head=True")], "test_solo.py separate_head"),
    Mutant("the branch has the skip's share too", "rules/highway_backprop.py",
           [("back(above) - skip * above", "back(above)")], "test_inference.py reaches_one_block_more"),
    Mutant("hard negatives are drawn in training mode", "rules/forward_forward.py",
           [("ctx.predict(ctx.x) if", "self.predict(ctx.network, ctx.auxiliary, ctx.x) if")],
           "test_extra_passes.py drawn_from_what"),
    Mutant("a group at rest keeps a batch that is not finite", "core/finite.py",
           [("if group.broken or not finite:", "if False:")],
           "test_extra_passes.py changes_nothing and last_layer"),
    Mutant("an average follows a block in a skipped update", "core/engine.py",
           [("if group.name in trace.skipped or group.broken:", "if False:")], "test_skipping.py leaves_nothing"),
    Mutant("a state within a skipped update does not know what it goes back to", "learner/skipping.py",
           [("buffer if old.get(id(buffer)) is None else", "buffer if True else")], "test_skipping.py goes_on"),
    Mutant("an update goes back to before its last batch", "core/engine.py",
           [("        if self.accumulation.batches == 1 and first:\n            self.finite",
             "        if True:\n            self.finite")], "test_learner.py before_the_first_batch"),
    Mutant("momentum without Nesterov", "core/optim.py",
           [('"nesterov": True', '"nesterov": False')], f"{ENGINE} nesterov"),
    Mutant("infinity is in every range", "core/ranges.py",
           [("abs(number) <= (LARGEST if self.whole else sys.float_info.max)", "True")],
           "test_ranges.py schedule or (no_rule and svp)"),
    Mutant("trunk's gradient not accumulated", "core/engine.py",
           [("trunk.gradient += sent_back", "trunk.gradient = sent_back")], f"{SID} module_after_module and sum"),
    Mutant("trunk's gradient scaled twice", "core/engine.py",
           [("h.grad / (self._weight * scale)", "h.grad / self._weight")], f"{TRUNK} scaler"),
    Mutant("the weight of a batch in the gradient sent back to a trunk", "core/engine.py",
           [("h.grad / (self._weight * scale)", "h.grad / scale")], f"{TRUNK} of_unequal_size"),
    Mutant("guidance counts batches", "learner/learner.py",
           [("self.groups_at(updates), trace)", "self.groups_at(step), trace)")],
           "test_accumulation.py counts_updates"),
    Mutant("an error in flush keeps the update", "core/engine.py",
           [("        with self._abandoned_on_error(groups):\n            for group",
             "        if True:\n            for group")],
           "test_accumulation.py flush_that_fails"),
    Mutant("replicas weigh the same, whatever they count", "core/engine.py",
           [("replicas.total(counted))", "counted * replicas.count)")], "test_data_parallel.py weighs_each"),
    Mutant("running statistics at rest stay a replica's own", "core/engine.py",
           [("        if self.execution.replicas.count == 1:\n            return\n", "        return\n")],
           "test_data_parallel.py of_blocks_at_rest"),
    Mutant("trunk's graph cut", "core/engine.py",
           [("Trunk(first, h, signals, out,", "Trunk(first, h, signals, out.detach().requires_grad_(),")],
           f"{TRUNK} gets_the_sum"),
    Mutant("all modules' graphs at once", "rules/sid.py",
           [("for i in range(end, blocks + 1)]", "for i in range(end, end)] + [range(end, blocks + 1)]")],
           f"{SID} memory and sum"),
    Mutant("mean is the sum", "rules/sid.py",
           [("gradient / place.blocks if", "gradient if")], f"{SID} module_after_module and mean"),
    Mutant("the belief's gradient goes back", "rules/sid.py",
           [("sent_back[:, : task.classes] = 0", "pass")], f"{SID} what_goes_back"),
    Mutant("consistency the other way round", "rules/sid.py",
           [("kl_divergence(log_before, log_p)", "kl_divergence(log_p, log_before)")], f"{SID} arithmetic"),
    Mutant("alpha of the wrong module", "rules/sid.py",
           [("Site(site.index - EXTRACTOR,", "Site(site.index - EXTRACTOR + 1,")], f"{SID} from_a_list"),
    Mutant("the validation labels stay clean", "data/loading.py",
           [("if not clean_validation:\n            val = val.relabelled(noisy[part])",
             "if False:\n            val = val.relabelled(noisy[part])")],
           "test_noise.py property"),
    Mutant("metrics keep the graph", "core/progress.py",
           [("value.detach() if isinstance(value, Tensor) else value", "value")],
           "test_learner.py metrics_are"),
    Mutant("forward without a graph", "core/engine.py",
           [("NOTHING if torch.is_grad_enabled() == learns else torch.set_grad_enabled(learns)", "torch.no_grad()")],
           f"{CONTRACT} learns and mlp and sll"),
    Mutant("draws do not depend on the block", "core/runner.py",
           [("(step, unit.site.index) if", "(step,) if")], f"{ENGINE} own_draws"),
    Mutant("draws do not depend on the step", "core/runner.py",
           [("(step, unit.site.index) if", "(unit.site.index,) if")], f"{ENGINE} own_draws"),
    Mutant("draws do not depend on the seed", "core/runner.py",
           [('derive_seed(self.execution.seed, "draw"', 'derive_seed("draw"')], f"{ENGINE} own_draws"),
    Mutant("parts of a batch have the same draws", "core/runner.py",
           [("(step, unit.site.index, part)", "(step, unit.site.index)")], "test_parts.py draws_of_its_own"),
    Mutant("parts of a batch weigh equally", "core/parts.py",
           [("Labelled(part, own, n / total)", "Labelled(part, own, len(own) / len(y))")],
           "test_parts.py as_many_labels"),
    Mutant("a later rank's part gets the whole batch", "core/calls.py",
           [("self._batch if self._part is None else self._part.of(self._batch)", "self._batch")],
           "test_calls_parts.py stages_have"),
    Mutant("passes that overwrite each other's tensors are let through", "learner/arguments.py",
           [("    if keeps:", "    if False:")], "test_calls_parts.py overwrite_each_others"),
    Mutant("a shared norm forgets its output", "replacements/norms.py",
           [("mul_(scale), None, None", "mul_(1.0), None, None")], "test_replacing.py from_their_output"),
    Mutant("codes of one bit more", "replacements/activations.py",
           [("code << (bits * place)", "code << place")], "test_replacing.py step_function"),
    Mutant("a projection is drawn anew for every batch", "replacements/velora.py",
           [("if not bool(self.direction.any()):", "if True:"), ("        self._known = id(self.direction)\n", "")],
           "test_replacing.py gradients_of_its_paper"),
    Mutant("a part begins the update anew", "core/engine.py",
           [("self.accumulation.batches <= 1 and not part", "self.accumulation.batches <= 1")],
           "test_parts.py of_the_whole_batch and local_ce"),
    Mutant("clipping left out", "core/engine.py",
           [("nn.utils.clip_grads_with_norm_(group.parameters, self.execution.clip, norm)", "pass")],
           f"{ENGINE} clipping"),
    Mutant("schedule ignored", "core/engine.py",
           [("set_learning_rate(optimizer, self._factor())",
             "set_learning_rate(optimizer, 1.0)")], f"{ENGINE} schedule_multiplies"),
    Mutant("schedule counts batches", "core/engine.py",
           [("        update = self.accumulation.updates\n", "        update = self.accumulation.updates * 2\n")],
           f"{ENGINE} schedule_multiplies"),
    Mutant("accumulated sum, not mean", "core/engine.py",
           [("torch._foreach_div_(gradients, self.accumulation.weight)", "pass")],
           f"{ENGINE} accumulated and local_ce"),
    Mutant("biases decay", "core/optim.py", [(', "weight_decay": 0.0}', "}")], f"{ENGINE} matrices_decay"),
    Mutant("multiplier ignored", "core/param_groups.py",
           [('multiplier = group.pop("lr_multiplier", 1.0)', 'multiplier = 0 * group.pop("lr_multiplier", 1.0) + 1')],
           f"{ENGINE} multiplier"),
    Mutant("sign of log BC", "core/functional.py",
           [("return torch.logsumexp(0.5", "return -torch.logsumexp(0.5")], "test_functional.py bc"),
    Mutant("KL from the block to its neighbour", "core/functional.py",
           [("log_p.exp() * (log_p - log_q)", "log_q.exp() * (log_q - log_p)")], f"{RULES} kl"),
    Mutant("neighbour not detached", "rules/sll.py",
           [("sent[-self._back].detach()", "sent[-self._back]")], f"{RULES} neighbours_posterior"),
    Mutant("sign of the likelihood", "rules/sll.py",
           [("_times(by_depth(self.likelihood_weight", "_times(-by_depth(self.likelihood_weight")],
           f"{RULES} likelihood or closed_form"),
    Mutant("an unlabelled sample counts as wrong", "core/tasks/classes.py",
           [("lambda y: (self.aligned(y) != UNLABELLED).sum()", "lambda y: torch.tensor(y.numel())")],
           "test_graph_forward.py counts_in_no_loss"),
    Mutant("a shared matrix learns from the blocks", "core/output_layer.py",
           [("return network.output_layer.weight.detach()", "return network.output_layer.weight")],
           "test_readouts.py one_graph"),
    Mutant("the copy of a shared matrix is renewed a step late", "learner/output_copy.py",
           [("self.version < done // self.refresh", "self.version < (done - 1) // self.refresh")],
           "test_solo.py copy_is_renewed"),
    Mutant("ignored positions count in the loss in chunks", "core/chunked.py",
           [("there = labels != ignore", "there = labels == labels")], "test_chunked.py torchs"),
    Mutant("a cell's label is its rarest class", "core/tasks/pixels.py",
           [("most, chosen = votes.max(-1)", "most, chosen = votes.min(-1)")], "test_tasks.py most_frequent"),
    Mutant("ignored pixels vote", "core/tasks/pixels.py",
           [("votes.index_add_(0, slot, counts.flatten().long())",
             "votes.index_add_(0, slot, counts.flatten().long() * 0 + 1)")], "test_tasks.py most_frequent"),
    Mutant("Gaussians of different spread are alike", "core/posteriors.py",
           [("(-log_sum).exp() - 0.5 * spread", "(-log_sum).exp() - 0.0 * spread")], "test_tasks.py gaussians"),
    Mutant("labels that do not hold agree for nothing", "core/posteriors.py",
           [("torch.logaddexp(0.5 * (on + other_on), 0.5 * (off + other_off))", "0.5 * (on + other_on)")],
           "test_tasks.py product"),
    Mutant("targets keep their scale", "core/tasks/numbers.py",
           [("/ y.new_tensor(self.std)\n", "/ 1.0\n")], "test_tasks.py standardised"),
    Mutant("one target is broadcast over several", "core/tasks/numbers.py",
           [("if y.dim() == 1 and self.targets > 1:", "if False:")], "test_tasks.py broadcast"),
    Mutant("a rule tries any task", "learner/arguments.py",
           [("if need not in rule.tasks:", "if False:")], "test_tasks_of_rules.py refused_in_a_sentence"),
    Mutant("posteriors of pixels are read off one corner of a cell", "rules/readout.py",
           [('places, mode="area")', 'places, mode="nearest")')], "test_tasks_of_rules.py another_resolution"),
    Mutant("a metric of a split is the mean over its batches", "runs/evaluation.py",
           [("found |= {f\"{block}/{name}\": float(value) for name, value in task.measures(whole).items()}", "pass")],
           "test_tasks_of_runs.py whole_split"),
    Mutant("the larger error wins", "core/tasks/metric.py",
           [("return -value if self.larger else value", "return -value")], "test_tasks_of_runs.py smaller_error"),
    Mutant("a known node sees its own label", "rules/graph_forward.py",
           [('self.variant == "nodes" or self.links == "both"', "True")], "test_graph_forward.py links_in"),
    Mutant("evaluation in training mode", "learner/prediction.py",
           [("        network.eval()\n", "")], f"{CONTRACT} evaluation and vgg and sll"),
    Mutant("optimizer state shared", "learner/state.py",
           [("copy.deepcopy(packed)", "packed")], "test_learner.py share_nothing"),
    Mutant("the step waits for no forward pass", "core/engine.py",
           [("if self.execution.replicas.deferred:", "if False:")], "test_data_parallel.py steps_while"),
    Mutant("all groups' gradients are alive", "core/engine.py",
           [("        self._step_reduced()\n        if not isinstance(self.rule, StepsByParameter)",
            "        if not isinstance(self.rule, StepsByParameter)")],
           "test_data_parallel.py steps_while"),
    Mutant("a module held twice runs once", "core/chains.py",
           [("in model._modules.items():", "in model.named_children():")],
           "test_blocks.py models_bits and shared"),
    Mutant("torn parts are read", "runs/checkpoint.py",
           [("whole = digest(about) == said and all(", "whole = True or all(")],
           f"{PARTS} alone_writes"),
    Mutant("a restart takes any run", "runs/folders.py",
           [('"start the job again") == _job() + "\\n":', '"start the job again"):')],
           f"{PARTS} folder_of_its_own"),
    Mutant("votes stay behind at a boundary", "learner/prediction.py",
           [("stage.pass_on(h, message, skipped=False)\n    return h if",
             "stage.pass_on(h, message * 0, skipped=False)\n    return h if")],
           f"{PIPE} votes and mlp and scalable"),
    Mutant("who waits for a silent rank is blamed", "parallel/ranks.py",
           [("return self.lost_rank(self.suspect(peer), reason)", "return self.lost_rank(peer, reason)")],
           "test_pipeline_processes.py sign_of_life"),
    Mutant("later ranks begin on their own", "learner/prediction.py",
           [("        return built.setup.stage.receive()\n", "        return built.setup.stage.receive()[0], None\n")],
           f"{PIPE} bits_of_one_process and mlp and sid"),
    Mutant("a group at rest learns", "core/groups.py",
           [("group if wanted else replace(", "group if True else replace(")],
           "test_boosted.py only_the_stage and mlp"),
    Mutant("boosting fits the label, not the residual", "rules/boosted.py",
           [("return task.distribution(y) - (total.sigmoid()", "return task.distribution(y) - 0.0 * (total.sigmoid()")],
           "test_boosted.py negative_gradient"),
    Mutant("a stage without a turn adds its output", "rules/boosted.py",
           [("if ctx.learns:", "if ctx.training:")], "test_boosted.py adds_nothing"),
    Mutant("both views are the same one", "rules/ssl_local.py",
           [("torch.cat([self.view(ctx.x, layout), self.view(ctx.x, layout), ctx.x])",
             "torch.cat([*[self.view(ctx.x, layout)] * 2, ctx.x])")], "test_ssl_local.py views_that_differ"),
    Mutant("the temperature of the contrast is fixed", "rules/ssl_local.py",
           [("nt_xent(z, self.temperature)", "nt_xent(z, 0.5)")], "test_ssl_local.py rules_temperature"),
    Mutant("SVP compares with the block before the last", "rules/svp.py",
           [("previous[-1].detach()", "previous[0].detach()")], f"{RULES} right_before_it"),
    Mutant("the taper ends one block later", "rules/auglocal.py",
           [("max(blocks - self.depth - 1, 1)", "max(blocks - self.depth, 1)")],
           "test_auxiliary_rules.py full_taper"),
    Mutant("a stage forgets what was skipped before it", "parallel/stage.py",
           [("        skipped = skipped or self._skipped\n", "")], f"{PIPE} early_stage"),
    Mutant("a table is standardised in float32", "data/batches.py",
           [("(1, torch.float64)", "(1, torch.float32)")], "test_tables.py standardised"),
    Mutant("labels are looked at when the folder is there", "runs/training.py",
           [("self.learner.check_labels(part.checked_labels)", "pass")], "test_graph_forward.py wrong_use"),
    Mutant("a link leaves the last words of its lanes", "scaling/counting.py",
           [("for _ in self.from_previous.lanes[1:]:", "for _ in ():")], "test_scaling.py last_word"),
    Mutant("at calls: a stem moves again with the head", "core/regular.py",
           [(", scratch_buffers(self.first.places()):", ":")], "test_calls.py stem_runs_once"),
    Mutant("at calls: the head draws what a stem has left", "core/regular.py",
           [("with torch.no_grad(), preserved_generators(self.device), ", "with torch.no_grad(), ")],
           "test_calls.py stem_runs_once"),
    Mutant("at calls: other bits are no matter", "core/calls.py",
           [("if not torch.equal(h, out):", "if False:")], "test_calls.py not_regular"),
    Mutant("at calls: a tied weight leaves with its owner", "memory/offload.py",
           [("if min(users) < first or max(users) > last]", "if False]")], "test_offload.py cut_at_its_calls_is_off"),
    Mutant("at calls: a buffer of others is released", "parallel/stage.py",
           [("if name not in kept]", "]")], "test_calls_on_ranks.py fixed_tensors"),
    Mutant("at calls: what a rank trains is used on another", "core/remote.py",
           [("if crossing.inside or crossing.after or wrong:", "if crossing.inside or crossing.after:")],
           "test_calls_on_ranks.py more_than_one_tensor"),
    Mutant("made late: a draw depends on what was drawn before", "core/late.py",
           [('seed_generators(derive_seed(self.seed, "weights", path), self.device)', "pass")],
           "test_late.py bits_depend"),
    Mutant("made late: blocks of others stay", "core/late.py",
           [("if self._holder is not block:\n            self.give_up()", "if self._holder is not block:")],
           "test_late.py no_more_than"),
    Mutant("made late: nobody looks what was written", "core/late.py",
           [("if tensor.numel() and _is_unwritten(tensor):", "if False:")], "test_late.py cannot_be_made"),
    Mutant("a changed file of the user's is run", "core/own_code.py",
           [("if recorded is not None and digest != recorded:", "if False:")], "test_outside.py changed_file"),
    Mutant("an optimizer without gradients is scaled", "core/engine.py",
           [("for o in group.optimizers if _has_gradient(o)]", "for o in group.optimizers]")],
           "test_optimizers.py thawed"),
    Mutant("evaluation puts optimizers into training mode", "learner/prediction.py",
           [("            if training:\n                optimizer.train()",
             "            if True:\n                optimizer.train()")], "test_optimizers.py mode_that"),
    Mutant("what an optimizer counts in its groups is not saved", "learner/state.py",
           [('"settings": {name: found for name, found in settings.items() if any(found)},', '"settings": {},')],
           "test_optimizers.py same_bits"),
    Mutant("state goes to another optimizer's parameters", "learner/state.py",
           [("for p in parameters_of([optimizer])]\n", "for p in group.parameters]\n")],
           "test_optimizers.py same_bits"),
    Mutant("weights of classifiers do not follow their own losses", "rules/hedge_backprop.py",
           [("discount**losses)", "discount**losses.mean())")], "test_online.py weights_of_a_learner"),
    Mutant("the scan back in time squares no power", "rules/stationary_feedback.py",
           [("a, reach = a * a, 2 * reach", "a, reach = a, 2 * reach")], "test_stationary_feedback.py loops"),
    Mutant("the state before a step has a history", "rules/stationary_feedback.py",
           [("torch.set_grad_enabled(False)", "pass")], "test_stationary_feedback.py truncated"),
    Mutant("the cell of an LSTM has no way back", "rules/stationary_feedback.py",
           [("_earlier(cells, c0) + i * g, cells, a)", "_earlier(cells, c0) + i * g, cells, 0 * a)")],
           "test_stationary_feedback.py full_backpropagation"),
    Mutant("the most useful unit is born again", "rules/continual_backprop.py",
           [("masked_fill(~mature, torch.inf).argsort(stable=True)",
             "masked_fill(~mature, -torch.inf).argsort(stable=True, descending=True)")],
           "test_online.py least_utility"),
    Mutant("a unit that is born again keeps its moments", "core/renewal.py",
           [("value.masked_fill_(mask, 0)", "value.masked_fill_(mask & ~mask, 0)")],
           "test_online.py least_utility or same_bits"),
    Mutant("further terms of a loss are passed over", "core/further.py",
           [("number.grad_fn not in behind", "number.grad_fn in behind")], "test_further.py said_once"),
    Mutant("SGD on the host is fused for 16 bits too", "core/optim.py",
           [("p.element_size() < 4 for p in tensors", "p.element_size() < 1 for p in tensors")],
           "test_optimizers.py every_type"),
    Mutant("a sample is mixed with itself", "data/batches.py",
           [("replace(self.part, mirrored=True)", "self.part")], "test_mixing.py convex_pair"),
    Mutant("a partner is augmented by another sample's draws", "data/batches.py",
           [("self._augmented(half, epoch, index, part)", "self._augmented(half, epoch, index, self.part)")],
           "test_mixing.py convex_pair"),
]  # fmt: skip


def broken_copy(place: Path, mutant: Mutant | None) -> None:
    """Copy `src` to `place` and apply the mutant; ValueError if its text does not occur exactly once."""
    shutil.copytree(ROOT / "src", place)  # bytecode too: it counts while time and size of its file are the same
    if mutant is None:
        return
    path = place / "layerwise" / mutant.file
    text = path.read_text()
    for old, new in mutant.changes:
        if text.count(old) != 1:
            raise ValueError(f"{mutant.file} holds {text.count(old)} times: {old!r}")
        text = text.replace(old, new)
    path.write_text(text)


def tests_on(place: Path, file: str, words: str) -> int:
    """Run the tests on the package at `place`, in this process; return pytest's exit code (0 passed, 1 failed)."""
    os.environ["PYTHONPATH"] = str(place)
    sys.path.insert(0, str(place))
    sys.dont_write_bytecode = True
    os.chdir(ROOT)
    with open(os.devnull, "w") as silence, redirect_stdout(silence), redirect_stderr(silence):
        # -m "": the tests named with a mutant run on it, slow ones too.
        options = ["-x", "-q", "-n0", "-m", "", "--tb=no", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
        code = pytest.main([*options, *map(str, (ROOT / "tests").rglob(file)), "-k", words])
    used = Path(sys.modules["layerwise"].__file__ or "")
    return int(code) if used.is_relative_to(place) else 99  # never the tests of another copy


def trial(job: tuple[Mutant | None, str]) -> tuple[str, float]:
    """The outcome for a mutant: `killed`, `survived`, or the error that left it open."""
    mutant, tests = job
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            broken_copy(Path(folder) / "src", mutant)
            code = tests_on(Path(folder) / "src", *tests.split(" ", 1))
            fate = {0: "survived", 1: "killed"}.get(code, f"error: pytest's exit code is {code}")
        except ValueError as reason:
            fate = f"error: {reason}"
    return fate, time.perf_counter() - start


def main() -> int:
    """Try the mutants whose names contain the given words; print a table."""
    words = " ".join(sys.argv[1:])
    chosen = [mutant for mutant in MUTANTS if words in mutant.name]
    if not chosen:
        print(f"no mutant is called {words!r}")
        return 2
    start = time.perf_counter()
    # First the tests on the unchanged copy, where they must pass.
    selected: dict[str, list[str]] = {}
    for mutant in chosen:
        file, expression = mutant.tests.split(" ", 1)
        selected.setdefault(file, []).append(f"({expression})")
    jobs: list[tuple[Mutant | None, str]] = [(None, f"{file} {' or '.join(found)}") for file, found in selected.items()]
    jobs += [(mutant, mutant.tests) for mutant in chosen]
    fates = []
    # A fresh fork for every job: torch is imported once, the package anew.
    with get_context("fork").Pool(WORKERS, maxtasksperchild=1) as pool:
        for (mutant, tests), (fate, seconds) in zip(jobs, pool.imap(trial, jobs, chunksize=1), strict=True):
            if mutant is None:
                good, name, file = "survived", "no fault", tests.split(" ", 1)[0]
            else:
                good, name, file = "killed", mutant.name, mutant.file
            fates.append("as it must" if fate == good else "error" if "error" in fate else "wrong")
            print(f"{name:40s} {file:20s} {seconds:5.1f} s  {fate}", flush=True)
    wrong, errors = fates.count("wrong"), fates.count("error")
    print(
        f"{len(chosen)} mutants, {len(selected)} test files: {wrong} not as it must be, {errors} errors; "
        f"{time.perf_counter() - start:.0f} s"
    )
    return 2 if errors else int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
