"use strict";
const $ = (id) => document.getElementById(id);
const state = { facts: null, picture: null, caption: false, screen: null, costs: null, start: 0, number: 0, timer: 0 };
const SLIDERS = ["strength", "num_sources", "edit0", "edit1", "map0", "map1", "threshold"];

async function get(path, options) {
  const reply = await fetch(path, options);
  const found = (reply.headers.get("Content-Type") || "").includes("json") ? await reply.json() : {};
  if (!reply.ok) throw new Error(found.error || `the server says ${reply.status}: its terminal has the reason`);
  return found;
}
const post = (path, body) => get(path, { method: "POST", body });

function say(error) {
  const lost = error instanceof TypeError;
  $("message").textContent = error ? (lost ? "the playground does not answer: is it still running?" : error.message) : "";
  $("message").hidden = !error;
}

function make(name, attributes, text) {
  const svg = ["rect", "line", "path", "title"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function ask() {
  const value = (id) => Number($(id).value);
  return JSON.stringify({
    picture: state.picture, question: $("question").value, caption: state.caption, strength: value("strength"),
    num_sources: byFraction() ? null : value("num_sources"), edit_layers: [value("edit0"), value("edit1")],
    attention_layers: [value("map0"), value("map1")], threshold: value("threshold"),
  });
}

/* K as a share of each grid's patches, until its slider is moved */
const byFraction = () => state.facts.source_fraction !== null && Number($("num_sources").value) === state.facts.num_sources;

async function look() {
  if (!state.picture) return;
  if (!$("question").value.trim()) { say(new Error("Type a question.")); return; }
  const number = ++state.number, asked = ask();
  document.body.classList.add("busy");
  try {
    const screen = await post("look", asked);
    if (number !== state.number) return;
    Object.assign(state, { screen, costs: null });
    say(null);
    showGrids();
    show();
    const { costs } = await post("cost", asked);
    if (number !== state.number) return;
    state.costs = costs;
    show();
  } catch (error) {
    if (number === state.number) say(error);
  } finally {
    if (number === state.number) document.body.classList.remove("busy");
  }
}

function later() {
  clearTimeout(state.timer);
  state.timer = setTimeout(look, 200);
}

const percent = (share) => (share === undefined ? "" : `${(100 * share).toFixed(1)} %`);

function show() {
  const { answers, grids, notes, code } = state.screen, grid = grids[Number($("grid").value)];
  const rows = answers.map((answer, place) => {
    const row = make("tr", { class: answer.text === answers[0].text ? "" : "changed" });
    const said = make("td", {}, answer.text || "(nothing)");
    said.append(make("small", {}, answer.why));
    const cost = state.costs && state.costs[place];
    const added = cost && `${cost.added < 0 ? "" : "+"}${cost.added.toFixed(1)} ms (${cost.ratio.toFixed(2)} x)`;
    const spent = cost ? (place ? added : `${cost.milliseconds.toFixed(1)} ms`) : "…";
    row.append(make("th", { scope: "row" }, answer.mode), said);
    const cells = { yes: percent(answer.yes), no: percent(answer.no), prefill: spent };
    for (const [head, text] of Object.entries(cells)) row.append(make("td", text ? { "data-head": head } : {}, text));
    return row;
  });
  $("answers").replaceChildren(...rows);
  const facts = { "credit entropy": `${grid.entropy.toFixed(3)} nats, ${percent(grid.entropy_share)} of ln N` };
  const count = grid.sources["two-pass"].length;
  if (grid.confidence !== undefined) {
    facts[grids.length > 1 ? "confidence here" : "confidence"] = `${grid.confidence.toFixed(3)}; auto falls back below ${Number($("threshold").value).toFixed(3)}`;
    facts.overlap = `${grid.overlap} of ${count} sources are two-pass's`;
  }
  $("facts").replaceChildren(...Object.entries(facts).flatMap(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]));
  $("notes").replaceChildren(...notes.map((note) => make("li", {}, note)));
  $("num_sources").max = grid.most_sources;
  $("code").textContent = code;
  draw();
}

const HEAT = [[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]]; // as the figures' "inferno"
function heat(share) {
  const place = share * (HEAT.length - 1), low = Math.min(Math.floor(place), HEAT.length - 2);
  const mixed = HEAT[low].map((value, channel) => value + (place - low) * (HEAT[low + 1][channel] - value));
  return `rgb(${mixed.map(Math.round).join()})`;
}

function showGrids() {
  const { grids, overview } = state.screen;
  $("gridrow").hidden = grids.length < 2;
  const options = grids.map((grid, n) => make("option", { value: n }, `${n + 1}: ${grid.rows} x ${grid.columns}`));
  $("grid").replaceChildren(...options);
  $("grid").value = overview;
}

function draw() {
  if (!state.screen) return;
  const grid = state.screen.grids[Number($("grid").value)], { rows, columns } = grid, parts = [];
  const kind = document.querySelector("input[name=map]:checked").value;
  const at = (patch) => [patch % columns, Math.floor(patch / columns)];
  const cell = (patch, attributes) => {
    const [x, y] = at(patch), inset = attributes.class === "missed" ? 0.08 : 0;
    return make("rect", { x: x + inset, y: y + inset, width: 1 - 2 * inset, height: 1 - 2 * inset, ...attributes });
  };
  const values = kind === "difference" && grid.predicted
    ? grid.attention.map((value, patch) => grid.predicted[patch] - value) : grid[kind];
  if (values) {
    const top = Math.max(...values.map(Math.abs), 1e-9);
    values.forEach((value, patch) => {
      const share = (Math.abs(value) / top) ** 0.7;
      const colour = kind === "difference" ? (value > 0 ? "#d1478f" : "#f2a900") : heat(share);
      const shade = cell(patch, { fill: colour, "fill-opacity": kind === "difference" ? 0.85 * share : 0.15 + 0.7 * share });
      if (!grid.eligible[patch]) shade.setAttribute("fill-opacity", 0);
      shade.append(make("title", {}, `${kind} ${(100 * value).toFixed(2)} %`));
      parts.push(shade);
    });
  }
  const marks = $("marks").value, chosen = (name) => grid.sources[name] || [];
  const owner = marks === "one-pass" ? "one-pass" : "two-pass";
  if ($("owned").checked && marks) chosen(owner).forEach((source, place) => grid.owned[owner][place].forEach((patch) => {
    const [x1, y1] = at(source), [x2, y2] = at(patch);
    parts.push(cell(patch, { class: "near" }));
    parts.push(make("line", { class: "tie", x1: x1 + 0.5, y1: y1 + 0.5, x2: x2 + 0.5, y2: y2 + 0.5 }));
  }));
  const two = marks === "one-pass" ? [] : chosen("two-pass"), one = marks === "two-pass" ? [] : chosen("one-pass");
  if (marks) for (const patch of new Set([...two, ...one])) {
    const [x, y] = at(patch), alone = marks !== "both" || !grid.sources["one-pass"];
    if (alone || (two.includes(patch) && one.includes(patch))) parts.push(cell(patch, { class: "hit" }));
    else if (two.includes(patch)) parts.push(cell(patch, { class: "missed" }));
    else parts.push(make("path", { class: "extra", d: `M${x + 0.2} ${y + 0.2}l.6 .6m0 -.6l-.6 .6` }));
  }
  $("picture").classList.toggle("grey", Boolean(values));
  $("overlay").setAttribute("viewBox", `0 0 ${columns} ${rows}`);
  $("overlay").setAttribute("preserveAspectRatio", "none");
  $("overlay").replaceChildren(...parts);
  const words = { attention: "brighter: more of the question's attention", predicted: "brighter: more, as the predictor foresees it",
    difference: "pink: predicted too high; amber: too low" };
  const lines = marks === "both" && grid.sources["one-pass"]
    ? [["hit", "both choose it"], ["missed", "two-pass only"], ["extra", "one-pass only"]]
    : marks ? [["hit", `sources of ${grid.sources[marks] ? marks : "two-pass"}`]] : [];
  const swatches = lines.flatMap(([mark, text]) => [make("i", { class: `swatch ${mark}` }, mark === "extra" ? "✕" : ""), text]);
  const shown = [words[kind] && values ? words[kind] + ". " : "", values && kind !== "none" ? "The border is never a source. " : ""];
  $("legend").replaceChildren(...swatches, make("br"), shown.join("") || " ");
}

function choose(picture, question) {
  state.picture = picture;
  if (question) { $("question").value = question; state.caption = false; }
  $("picture").src = `view/${encodeURIComponent(picture)}`;
  $("overlay").replaceChildren();
  look();
}

async function upload(file) {
  try {
    if (file.size > state.facts.most_bytes) throw new Error(`${file.name} has ${(file.size / 1e6).toFixed(0)} MB; this page takes at most ${state.facts.most_bytes / 1e6} MB`);
    const { picture } = await post(`upload?name=${encodeURIComponent(file.name)}`, file);
    say(null);
    press(null);
    choose(picture);
  } catch (error) {
    if (state.picture && !(error instanceof TypeError)) error.message += "; the picture below is unchanged.";
    say(error);
  }
}

function press(button) {
  for (const other of $("gallery").children) other.setAttribute("aria-pressed", other === button);
}

async function gallery(first) {
  const by = $("order").value, { entries } = await get(`gallery?by=${by}&start=${state.start}`);
  const shown = entries.length ? entries : state.facts.scenes.map((image_id) => ({ image_id, question: $("question").value }));
  const buttons = shown.map((entry) => {
    const button = make("button", { type: "button", "aria-pressed": false });
    const numbers = entry.overlap === undefined ? "" : `overlap ${percent(entry.overlap)}, entropy ${percent(entry.entropy)}, margin moved ${entry.shift.toFixed(2)}${entry.changed ? ", answer changed" : ""}; annotated: ${entry.label}`;
    const text = make("span", {}, entry.question);
    text.append(make("small", { class: "soft" }, ` ${numbers}`));
    button.append(make("img", { src: `view/${entry.image_id}`, alt: "" }), text);
    button.onclick = () => { press(button); choose(String(entry.image_id), entry.question); };
    return button;
  });
  $("gallery").replaceChildren(...buttons);
  $("less").disabled = !state.start;
  $("more").disabled = state.start + buttons.length >= state.facts.entries;
  $("ordered").textContent = state.facts.entries
    ? `${state.facts.orders[by]}; ${state.start + 1} to ${state.start + buttons.length} of ${state.facts.entries.toLocaleString("en")} scenes of the last evaluation, each with its first question in this order`
    : "not sorted: an evaluation with a predictor (python train.py) writes the answers that this needs";
  if (first && buttons.length) buttons[0].click();
}

function reset() {
  const { facts } = state, [e0, e1] = facts.edit_layers, [m0, m1] = facts.attention_layers;
  const starts = [facts.strength, facts.num_sources, e0, e1, m0, m1, facts.threshold];
  const last = facts.depth - 1, least = facts.state_layer;
  for (const id of ["edit0", "edit1"]) Object.assign($(id), { min: least, max: last });
  for (const id of ["map0", "map1"]) Object.assign($(id), { min: least + 1, max: last });
  $("num_sources").max = Math.max(facts.num_sources, $("num_sources").max || 0);
  SLIDERS.forEach((id, place) => { $(id).value = starts[place]; write(id); });
}

function write(id) {
  const digits = { strength: 2, threshold: 3 }[id] || 0;
  const share = id === "num_sources" && byFraction() && percent(state.facts.source_fraction);
  $(id).nextElementSibling.value = share || Number($(id).value).toFixed(digits);
}

function slide(id) {
  const pair = { edit0: "edit1", edit1: "edit0", map0: "map1", map1: "map0" }[id];
  const value = Number($(id).value), first = id.endsWith("0");
  if (pair && (first ? value > Number($(pair).value) : value < Number($(pair).value))) $(pair).value = value;
  for (const name of [id, pair]) if (name) write(name);
  later();
}

function connect() {
  for (const id of SLIDERS) $(id).oninput = () => slide(id);
  for (const input of document.querySelectorAll("input[name=map], #owned, #marks")) input.onchange = draw;
  $("grid").onchange = show;
  $("form").onsubmit = (event) => { event.preventDefault(); look(); };
  $("question").oninput = () => { state.caption = false; };
  $("caption").onclick = () => { $("question").value = state.facts.caption; state.caption = true; look(); };
  $("reset").onclick = () => { reset(); look(); };
  $("file").onchange = () => { if ($("file").files[0]) upload($("file").files[0]); $("file").value = ""; };
  $("copy").onclick = async () => { await navigator.clipboard.writeText($("code").textContent); $("copy").textContent = "copied"; };
  $("order").onchange = () => { state.start = 0; gallery().catch(say); };
  $("more").onclick = () => { state.start += $("gallery").children.length; gallery().catch(say); };
  $("less").onclick = () => { state.start = Math.max(0, state.start - state.facts.page); gallery().catch(say); };
  const drop = $("drop"), over = (on) => (event) => { event.preventDefault(); drop.classList.toggle("over", on); };
  Object.assign(drop, { ondragover: over(true), ondragleave: over(false) });
  drop.ondrop = (event) => { over(false)(event); if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]); };
  document.onkeydown = (event) => {
    if (["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName) && event.target.type !== "radio" || event.ctrlKey || event.metaKey || event.altKey) return;
    const map = document.querySelectorAll("input[name=map]")[Number(event.key) - 1];
    if (map) { map.checked = true; draw(); }
    if (event.key === "n") { $("owned").checked = !$("owned").checked; draw(); }
  };
}

async function start() {
  const facts = (state.facts = await get("facts"));
  $("model").textContent = `· ${facts.name}`;
  $("fitted").textContent = `predictor: ${facts.predictor}`;
  $("fitted").hidden = !facts.predictor;
  $("without").textContent = facts.without;
  $("without").hidden = !facts.without;
  if (facts.without) { $("marks").value = "two-pass"; $("marks").disabled = true; $("threshold").disabled = true; }
  for (const value of ["predicted", "difference"]) document.querySelector(`input[value=${value}]`).disabled = Boolean(facts.without);
  $("order").replaceChildren(...Object.keys(facts.orders).map((name) => make("option", {}, name)));
  $("question").maxLength = facts.question_characters;
  $("question").value = "Is there a dog in the image?";
  reset();
  connect();
  await gallery(true);
}

start().catch(say);
