// What a node that trains shows on the canvas: its loss curve while it works, and the buttons Finish now and Continue.
// All that is saved into the graph is how many steps were done, as a property of the node.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

// Each sends `counterpoint.progress` while it trains, and `counterpoint_loss` and `counterpoint_steps` in its ui when it is done.
const TRAINERS = ["CounterpointTrainEmbedding", "CounterpointTrainStyleLora", "CounterpointTrainPrior", "CounterpointTrainImageTokens"];
const STEPS_DONE = "counterpoint_steps"; // the property
const MORE = 200; // steps

const HEIGHT = 150; // pixels, the least
const MARGIN = 10; // around it, in the classic renderer
const AVERAGED = 20; // points in the running mean, as the server's own curve
const MOST_POINTS = 1000; // then every other one is dropped
const DRAW_EVERY = 100; // milliseconds

const IDLE = "The loss curve appears here while this node trains.";
const ENDINGS = {
  execution_success: "Done.",
  execution_interrupted: "Cancelled",
  execution_error: "Stopped by an error",
};

const MARKUP = `
  <div class="plot">
    <svg viewBox="0 0 1 1" preserveAspectRatio="none"><path class="raw"/><path class="line"/></svg>
    <span class="high"></span><span class="low"></span>
  </div>
  <div class="foot">
    <span class="status"></span>
    <button type="button" class="finish" title="End the training after this step; the graph goes on with what was learned.">Finish now</button>
    <button type="button" class="continue">Continue for ${MORE} more</button>
  </div>
  <div class="contrast"></div>`;

const STYLE = `
  .counterpoint-training { display: flex; flex-direction: column; gap: 4px; min-height: ${HEIGHT}px; box-sizing: border-box;
    font-size: 11px; line-height: 1.35; color: var(--input-text); }
  .counterpoint-training .plot { position: relative; flex: 1; min-height: 60px; overflow: hidden; border-radius: 6px;
    background: var(--comfy-input-bg); border: 1px solid color-mix(in srgb, var(--border-color) 50%, transparent); }
  .counterpoint-training svg { position: absolute; left: 38px; width: calc(100% - 44px); height: 100%; }
  .counterpoint-training path { fill: none; stroke-linecap: round; stroke-linejoin: round; vector-effect: non-scaling-stroke; }
  .counterpoint-training .raw { stroke: var(--input-text); stroke-opacity: 0.3; stroke-width: 2.5px; }
  .counterpoint-training .line { stroke: var(--p-primary-color, currentColor); stroke-width: 2px; }
  .counterpoint-training .high, .counterpoint-training .low { position: absolute; left: 6px; color: var(--descrip-text); }
  .counterpoint-training .high { top: 3px; }
  .counterpoint-training .low { bottom: 3px; }
  .counterpoint-training .foot { display: flex; gap: 8px; align-items: center; }
  .counterpoint-training .status { flex: 1; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
  .counterpoint-training .contrast { color: var(--descrip-text); display: -webkit-box; -webkit-box-orient: vertical;
    -webkit-line-clamp: 2; overflow: hidden; }
  .counterpoint-training .contrast:empty, .counterpoint-training button[hidden] { display: none; }
  .counterpoint-training button { padding: 4px 10px; font: inherit; cursor: pointer; border-radius: 6px;
    color: var(--input-text); background: var(--comfy-input-bg); border: 1px solid var(--border-color); }
  .counterpoint-training button:disabled { cursor: default; opacity: 0.45; }`;

/** What is known about one training; before its first step it says nothing. */
class Run {
  training = true;
  finishing = false;
  unfinished = false; // cancelled, or stopped by an error
  points = []; // {step, loss} as they were measured
  mean = []; // the same, smoothed
  step = 0;
  steps = 0;
  stats = {};
  said = "Getting ready…";

  constructor(promptId, nodeId) {
    Object.assign(this, { promptId, nodeId });
  }

  /** A training that is over, from what its node left behind. */
  static over(output) {
    const run = new Run();
    run.close(output);
    return run;
  }

  take({ step, steps, loss, eta_s, stats }) {
    Object.assign(this, { step, steps, stats: { ...this.stats, ...stats } }); // some are told of every 50th step only
    this.said = `Step ${step} of ${steps}${step < steps ? timeLeft(eta_s) : ""}`;
    if (loss == null) return;
    if (this.points.length >= MOST_POINTS) this.points = this.points.filter((_, i) => i % 2);
    this.points.push({ step, loss });
    this.mean = this.points.map(({ step }, i) => ({ step, loss: average(this.points.slice(Math.max(0, i + 1 - AVERAGED), i + 1)) }));
  }

  /** Over, with the node's own curve (its mean at equal distances) and its own words. */
  close({ counterpoint_loss: losses, counterpoint_steps: [steps], text }) {
    this.training = false;
    this.said = (text ?? []).join(" ");
    this.steps = steps;
    this.mean = losses.map((loss, i) => ({ step: ((i + 1) / losses.length) * this.steps, loss }));
  }

  /** Over without a result, or with one that went to another tab. */
  end(words) {
    this.training = false;
    this.unfinished = words !== ENDINGS.execution_success;
    const where = this.step ? ` at step ${this.step} of ${this.steps}.` : ".";
    this.said = words === ENDINGS.execution_success ? words : words + where;
  }
}

const average = (points) => points.reduce((sum, { loss }) => sum + loss, 0) / points.length;

function timeLeft(seconds) {
  if (seconds == null) return "";
  if (seconds < 90) return `, ${Math.round(seconds)} s left`;
  return seconds < 5400 ? `, ${Math.round(seconds / 60)} min left` : `, ${(seconds / 3600).toFixed(1)} h left`;
}

/** The widget's element; it is SVG and text, so the theme and any zoom are the browser's work. */
class Curve {
  constructor(node) {
    this.node = node;
    this.element = Object.assign(document.createElement("div"), { className: "counterpoint-training", innerHTML: MARKUP });
    for (const part of ["raw", "line", "high", "low", "status", "contrast"]) this[part] = this.element.querySelector(`.${part}`);
    this.finishing = this.element.querySelector(".finish");
    this.finishing.addEventListener("click", () => this.finish());
    this.continuing = this.element.querySelector(".continue");
    this.continuing.addEventListener("click", () => this.continue());
    this.paint();
  }

  /** Steps that were done when a training of this node last gave a result. */
  get done() {
    return this.node.properties[STEPS_DONE] ?? 0;
  }

  show(run) {
    this.run = run;
    this.waiting ??= setTimeout(() => requestAnimationFrame(() => this.paint()), DRAW_EVERY);
  }

  showResult(output) {
    if (this.run?.training) this.run.close(output);
    else this.run = Run.over(output);
    this.node.properties[STEPS_DONE] = output.counterpoint_steps[0];
    this.show(this.run);
  }

  paint() {
    this.waiting = undefined;
    const run = this.run;
    this.status.textContent = this.status.title = run?.finishing && run.training ? "Finishing after this step…" : (run?.said ?? IDLE);
    this.contrast.textContent = this.contrast.title = run?.training ? figures(run.stats) : "";
    this.finishing.hidden = !run?.training;
    this.finishing.disabled = !run?.step || run.finishing;
    this.continuing.hidden = run?.training || run?.unfinished || !this.done; // Run goes on with what was left unfinished
    this.continuing.title = `Set steps to ${this.done + MORE} and run: the training goes on where it was.`;
    if (run?.mean.length) this.plot(run);
  }

  plot({ points, mean, steps }) {
    const [low, high] = range(points, mean);
    const at = ({ step, loss }) => `${(step / steps).toFixed(4)} ${(0.95 - (0.9 * (loss - low)) / (high - low)).toFixed(4)}`;
    this.raw.setAttribute("d", points.map((point) => `M${at(point)}h0`).join(""));
    this.line.setAttribute("d", `M${mean.map(at).join("L")}`);
    this.high.textContent = high.toPrecision(3);
    this.low.textContent = low.toPrecision(3);
  }

  async finish() {
    const run = this.run;
    run.finishing = true;
    this.paint();
    try {
      await ask("/counterpoint/finish", { prompt_id: run.promptId, node_id: run.nodeId });
    } catch (error) {
      run.finishing = false;
      this.paint();
      complain("Finish now did not work", error.message);
    }
  }

  /** `steps` is what may differ when a run goes on, so the same graph with more of them trains on. */
  async continue() {
    const steps = this.done + MORE;
    if (this.node.inputs?.find(({ name }) => name === "steps")?.link != null)
      return complain("Steps come from another node", `Set them to ${steps} there, and run.`);
    const widget = this.node.widgets.find(({ name }) => name === "steps");
    widget.value = steps;
    widget.callback?.(steps);
    await app.queuePrompt(0, 1);
  }
}

const complain = (summary, detail) => app.extensionManager.toast.add({ severity: "error", summary, detail, life: 10000 });

/** What there is of the figures that say how the training fares. */
function figures({ cosine, removed, usual, signal, skipped, ...others }) {
  return [
    ofPrior(others),
    cosine != null && removed != null && `shared with negatives: cos ${cosine.toFixed(2)}, removed ${removed.toFixed(2)}`,
    usual != null && `${usual.toFixed(2)} times as long as usual words`,
    signal != null && `signal ${signal.toFixed(2)} of the noise`,
    skipped > 0 && `${skipped} steps skipped`,
  ]
    .filter(Boolean)
    .join("; ");
}

/** Of a prior, told together or not at all: a collapsed one would win by its cosine, which stands last in case the line is cut. */
function ofPrior({ frechet, diversity, norm, "centred cosine": centred }) {
  if ([frechet, diversity, norm, centred].some((figure) => figure == null)) return "";
  const told = { Frechet: frechet, diversity, length: norm, "centred cos": centred };
  return `held out: ${Object.entries(told).map(([name, figure]) => `${name} ${figure.toFixed(2)}`).join(", ")}`;
}

/** Lowest and highest loss that the plot shows: all but the wildest 2 % on either side. */
function range(points, mean) {
  const losses = [...points, ...mean].map(({ loss }) => loss).sort((a, b) => a - b);
  const aside = Math.floor(losses.length / 50);
  const [low, high] = [losses[aside], losses[losses.length - 1 - aside]];
  return high > low ? [low, high] : [low - 0.5, high + 0.5];
}

async function ask(route, data) {
  const answer = await api.fetchApi(route, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(data) });
  if (answer.ok) return;
  const { error } = await answer.json().catch(() => ({}));
  throw new Error(error ?? `The server answered ${answer.status} ${answer.statusText}.`);
}

const curves = new WeakMap(); // node -> Curve
let started; // id of the prompt that runs
let live; // the latest Run that was heard of; it outlives its node when the canvas shows another graph for a while

/** The node at "9", at "13:9" (node 9 inside sub-graph node 13) or at "<id of a sub-graph>:9". */
function nodeAt(address) {
  const path = String(address).split(":");
  const id = path.pop();
  let graph = app.rootGraph;
  for (const step of path) graph = graph?.subgraphs?.get(step) ?? graph?.getNodeById(step)?.subgraph;
  return graph?.getNodeById(id);
}

const curveAt = (address) => curves.get(nodeAt(address) ?? {});

function hear({ detail }) {
  if (live?.promptId !== detail.prompt_id || live.nodeId !== detail.node_id) live = new Run(detail.prompt_id, detail.node_id);
  live.take(detail);
  curveAt(detail.node_id)?.show(live);
}

/** A node begins to work; a training says nothing more until its first step. */
function begun(address) {
  const curve = curveAt(address);
  if (!curve) return;
  live = new Run(started, String(address));
  curve.show(live);
}

function ended(words, promptId) {
  if (!live?.training || live.promptId !== promptId) return;
  live.end(words);
  curveAt(live.nodeId)?.show(live);
}

/** Nodes that the page has made anew (another tab, undo, a job opened from the history) get their curve back. */
function restore(outputs) {
  for (const [address, output] of Object.entries(outputs ?? {})) {
    const curve = output?.counterpoint_loss?.length && curveAt(address);
    if (curve && !curve.run) curve.showResult(output);
  }
}

function addCurve(node) {
  const curve = new Curve(node);
  const place = { margin: MARGIN, hideOnZoom: false, hideInPanel: true, getMinHeight: () => HEIGHT + 2 * MARGIN };
  const options = { ...place, serialize: false, getValue: () => null, setValue: () => {} };
  const widget = node.addDOMWidget("loss curve", "COUNTERPOINT_TRAINING", curve.element, options);
  widget.serialize = false; // the option keeps it out of the prompt, this out of the saved graph
  node.setSize([node.size[0], node.computeSize()[1]]);
  curves.set(node, curve);
}

app.registerExtension({
  name: "counterpoint.training",

  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
    api.addEventListener("counterpoint.progress", hear);
    api.addEventListener("execution_start", ({ detail }) => (started = detail.prompt_id));
    api.addEventListener("executing", ({ detail }) => detail && begun(detail));
    for (const [name, words] of Object.entries(ENDINGS)) api.addEventListener(name, ({ detail }) => ended(words, detail.prompt_id));
  },

  beforeRegisterNodeDef(nodeType, { name }) {
    if (!TRAINERS.includes(name)) return;
    const { onNodeCreated, onConfigure, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...given) {
      onNodeCreated?.apply(this, given);
      addCurve(this);
    };
    nodeType.prototype.onConfigure = function (...given) {
      onConfigure?.apply(this, given);
      curves.get(this)?.paint();
    };
    nodeType.prototype.onExecuted = function (output, ...given) {
      onExecuted?.call(this, output, ...given);
      if (output?.counterpoint_loss?.length) curves.get(this)?.showResult(output);
    };
  },

  onNodeOutputsUpdated: restore,
  afterConfigureGraph: () => restore(app.nodeOutputs),
});
