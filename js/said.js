// What a node has to say once it ran, under it. The page itself shows the text of a few nodes of core only.

import { app } from "../../scripts/app.js";

const TRAINS = "counterpoint_loss"; // in the output of nodes that show their text beside a curve
const LINES = 4; // more than that are scrolled
const MARGIN = 10; // around it, in the classic renderer

const STYLE = `
  .counterpoint-said { box-sizing: border-box; overflow: auto; padding: 4px 8px; font-size: 11px; line-height: 15px; border-radius: 6px;
    white-space: pre-wrap; user-select: text; color: var(--input-text); background: var(--comfy-input-bg); }`;

const boxes = new WeakMap(); // node -> its element

function show(node, output) {
  if (!output?.text?.length || output[TRAINS] || output.images?.length) return;
  const box = boxes.get(node) ?? addBox(node);
  box.textContent = [output.text].flat().join("\n");
}

function addBox(node) {
  const element = Object.assign(document.createElement("div"), { className: "counterpoint-said" });
  for (const event of ["pointerdown", "wheel"]) element.addEventListener(event, (e) => e.stopPropagation()); // text can be marked
  const height = () => LINES * 15 + 8 + 2 * MARGIN;
  const options = { margin: MARGIN, hideOnZoom: false, hideInPanel: true, getMinHeight: height, getMaxHeight: height };
  const widget = node.addDOMWidget("said", "COUNTERPOINT_SAID", element, { ...options, serialize: false, getValue: () => null, setValue: () => {} });
  widget.serialize = false; // the option keeps it out of the prompt, this out of the saved graph
  node.setSize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
  boxes.set(node, element);
  return element;
}

/** Nodes that the page has made anew say again what they said. */
function restore(outputs) {
  for (const [id, output] of Object.entries(outputs ?? {})) {
    const node = app.rootGraph?.getNodeById(id);
    if (node?.type?.startsWith("Counterpoint") && !boxes.has(node)) show(node, output);
  }
}

app.registerExtension({
  name: "counterpoint.said",

  setup() {
    document.head.append(Object.assign(document.createElement("style"), { textContent: STYLE }));
  },

  beforeRegisterNodeDef(nodeType, { name }) {
    if (!name.startsWith("Counterpoint")) return;
    const { onExecuted } = nodeType.prototype;
    nodeType.prototype.onExecuted = function (output, ...given) {
      onExecuted?.call(this, output, ...given);
      show(this, output);
    };
  },

  onNodeOutputsUpdated: restore,
  afterConfigureGraph: () => restore(app.nodeOutputs),
});
