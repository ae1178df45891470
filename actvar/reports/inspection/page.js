"use strict";

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const state = { block: 1, step: data.scales.at(-1)?.step, view: "block", token: null };

const scaleNow = () => data.scales.find((scale) => scale.step === state.step);
const blockNow = () => scaleNow().blocks[state.block - 1];

function element(parent, name, attributes = {}, text = null) {
  const isSvg = ["svg", "image", "rect", "path", "text"].includes(name);
  const made = isSvg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
}

function place(token, scale) {
  return { x: token % scale.width, y: Math.floor(token / scale.width) };
}

/* How many blocks updated each token. */
function timesUpdated(scale) {
  const times = new Array(scale.height * scale.width).fill(0);
  for (const block of scale.blocks) for (const token of block.kept) times[token] += 1;
  return times;
}

function drawStage() {
  const scale = scaleNow(), block = blockNow(), depth = scale.blocks.length;
  const { height, width } = scale, tokens = height * width;
  const stage = byId("stage");
  stage.replaceChildren();
  stage.setAttribute("viewBox", `0 0 ${width} ${height}`);
  stage.style.aspectRatio = `${width} / ${height}`;
  const picture = byId(`actvar-${scale.step}`).getAttribute("src");
  element(stage, "image", { href: picture, width, height, preserveAspectRatio: "none" });
  const cell = (token, attributes) => {
    const { x, y } = place(token, scale);
    return element(stage, "rect", { x: x + 0.03, y: y + 0.03, width: 0.94, height: 0.94, ...attributes });
  };
  if (state.view === "block") {
    const kept = new Set(block.kept);
    for (let token = 0; token < tokens; token++)
      cell(token, { class: kept.has(token) ? "kept" : "left", "data-token": token });
    byId("caption").textContent =
      `Block ${state.block} of ${depth}: ${block.kept.length} of ${tokens} tokens updated` +
      (block.experts === null ? ", all experts." : `, ${countOn(block.experts[0])} of ${data.experts} experts each.`);
  } else {
    const times = timesUpdated(scale);
    times.forEach((count, token) => {
      if (count) cell(token, { class: "kept", "data-token": token, style: `fill-opacity:${(0.65 * count) / depth}` });
      const { x, y } = place(token, scale);
      element(stage, "text", { x: x + 0.5, y: y + 0.5 }, count);
    });
    const reached = times.filter((count) => count > 0).length;
    byId("caption").textContent =
      `In how many of ${depth} blocks each token was updated; together they reach ${reached} of ${tokens}.`;
  }
  if (state.token !== null) cell(state.token, { class: "chosen" });
}

function countOn(experts) {
  return [...experts].filter((on) => on === "1").length;
}

/* Numbers, from 1, of the experts on at the chosen token in this block; null where they do not apply. */
function chosenExperts() {
  const block = blockNow(), at = block.kept.indexOf(state.token);
  if (at < 0 || block.experts === null) return null;
  return [...block.experts[at]].flatMap((on, expert) => (on === "1" ? [expert + 1] : []));
}

function drawToken() {
  const { x, y } = place(state.token, scaleNow());
  if (state.token === null) byId("token").textContent = "";
  else if (!blockNow().kept.includes(state.token))
    byId("token").textContent = `Row ${y + 1}, column ${x + 1}: this block left it as it was.`;
  else {
    const experts = chosenExperts();
    byId("token").textContent =
      `Row ${y + 1}, column ${x + 1}: ` + (experts === null ? "updated by all experts." : `experts ${experts.join(", ")}.`);
  }
}

function drawMaps() {
  const block = blockNow(), scale = scaleNow(), maps = byId("maps"), chosen = chosenExperts() ?? [];
  maps.replaceChildren();
  if (block.experts === null) {
    element(maps, "p", {}, "This block's FFN is dense at this token map: every expert works on every updated token.");
    return;
  }
  for (let expert = 0; expert < data.experts; expert++) {
    const path = { on: "", off: "" };
    block.kept.forEach((token, at) => {
      const { x, y } = place(token, scale);
      path[block.experts[at][expert] === "1" ? "on" : "off"] += `M${x + 0.04} ${y + 0.04}h.92v.92h-.92z`;
    });
    const figure = element(maps, "figure", chosen.includes(expert + 1) ? { class: "chosen" } : {});
    const load = `${Math.round(100 * block.load[expert])} %`;
    const svg = element(figure, "svg", {
      viewBox: `0 0 ${scale.width} ${scale.height}`, role: "img", "aria-label": `expert ${expert + 1}, on at ${load} of the updated tokens`,
    });
    for (const kind of ["off", "on"]) element(svg, "path", { class: kind, d: path[kind] });
    const caption = element(figure, "figcaption");
    element(caption, "b", {}, expert + 1);
    element(caption, "span", {}, load);
  }
}

function drawLoad() {
  const table = byId("load");
  table.replaceChildren();
  const head = element(element(table, "thead"), "tr");
  element(head, "th", { scope: "col" }, "expert");
  for (let expert = 1; expert <= data.experts; expert++) element(head, "th", { scope: "col" }, expert);
  const body = element(table, "tbody");
  scaleNow().blocks.forEach((block, index) => {
    const row = element(body, "tr", index + 1 === state.block ? { class: "current" } : {});
    element(element(row, "th", { scope: "row" }), "button", { type: "button" }, `block ${index + 1}`);
    row.addEventListener("click", () => change({ block: index + 1 }));
    if (block.load === null) element(row, "td", { class: "dense", colspan: data.experts }, "dense");
    else
      for (const share of block.load)
        element(row, "td", { style: `--load:${100 * share}%`, class: share > 0.6 ? "strong" : "" }, Math.round(100 * share));
  });
}

function draw() {
  byId("block").value = state.block;
  byId("number").textContent = state.block;
  for (const input of document.querySelectorAll("input[name=scale]")) input.checked = Number(input.value) === state.step;
  drawStage();
  drawToken();
  drawMaps();
  drawLoad();
}

function change(changes) {
  Object.assign(state, changes);
  history.replaceState(null, "", `#block=${state.block}&step=${state.step}`);
  draw();
}

/* The state in the address: #block=3&step=5 */
function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1));
  const block = Number(asked.get("block")), step = Number(asked.get("step"));
  if (data.scales.some((scale) => scale.step === step)) state.step = step;
  if (scaleNow().blocks[block - 1]) state.block = block;
}

function start() {
  for (const scale of data.scales) {
    const label = element(byId("scales"), "label");
    element(label, "input", { type: "radio", name: "scale", value: scale.step });
    element(label, "span", {}, `${scale.height}×${scale.width}`);
  }
  byId("scales").addEventListener("change", (event) => change({ step: Number(event.target.value), token: null }));
  byId("views").addEventListener("change", (event) => change({ view: event.target.value }));
  byId("block").addEventListener("input", (event) => change({ block: Number(event.target.value) }));
  byId("stage").addEventListener("click", (event) => {
    const box = byId("stage").getBoundingClientRect(), { height, width } = scaleNow();
    const cell = (at, length, cells) => Math.max(0, Math.min(cells - 1, Math.floor((cells * at) / length)));
    const x = cell(event.clientX - box.left, box.width, width), y = cell(event.clientY - box.top, box.height, height);
    change({ token: y * width + x });
  });
  window.addEventListener("hashchange", () => { readAddress(); draw(); });
  readAddress();
  draw();
}

if (data.scales.length) start();
else byId("explorer").textContent = "No step of this sample is sparse.";
