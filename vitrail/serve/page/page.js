// One picture, one or two models: ask, show bars, then reasons, story and attention as they come.
import { Story } from "./story.js";
import { Attention } from "./attention.js";
import { $, download, element, percent, saveCanvas } from "./drawing.js";
import { drawFindings } from "./findings.js";

const state = { file: null, models: [], stop: null, token: sessionStorage.getItem("token") ?? "" };
const story = new Story(), attention = new Attention();
const chosen = () => [$("model").value, $("beside").value].filter(Boolean);
const about = (name) => state.models.find((model) => model.name === name);
const unique = (names) => names.filter((name, at) => names.indexOf(name) === at);
const explainers = (found) => !state.explains ? [] : unique(found.filter(({ model, results: [record] }) =>
  about(model).explain.methods.length && (!record.detections || record.detections.length)).map(({ model }) => model));

const storytellers = () => state.explains ? unique(chosen()).filter((name) => about(name).explain.story) : [];

class Refused extends Error {}

async function call(path, parameters = {}, body = null, signal = undefined) {
  const headers = {};
  if (state.token) headers.authorization = `Bearer ${state.token}`;
  if (body) headers["content-type"] = body.type || "application/octet-stream";
  const query = new URLSearchParams(Object.entries(parameters).filter(([, value]) => value !== "" && value != null));
  const answer = await fetch(`${path}?${query}`, { method: body ? "POST" : "GET", headers, body, signal });
  const value = await answer.json();
  if (answer.status === 401) $("door").hidden = false;
  if (!answer.ok) throw new Refused(value.error);
  return value;
}

function say(text) { $("status").textContent = text; }
function trouble(error) {
  if (error.name === "AbortError") return;
  say(error instanceof Refused ? error.message : "The service does not answer. Is it still running?");
}

async function open() {
  const { models, explain } = await call("models");
  $("door").hidden = true;
  state.models = models;
  state.explains = explain;
  const kept = chosen();
  $("model").replaceChildren(...models.map((model) => new Option(model.name, model.name)));
  $("beside").replaceChildren(new Option("none", ""), ...models.map((model) => new Option(model.name, model.name)));
  if (kept[0] && about(kept[0])) $("model").value = kept[0];
  $("beside-label").hidden = models.length < 2;
  $("version").textContent = models.map((model) => `${model.name} ${model.version}`).join(", ");
  say("");
  document.documentElement.dataset.ready = "yes";
}

async function ask(file) {
  state.file = file;
  const url = URL.createObjectURL(file), image = $("preview");
  image.onload = () => { URL.revokeObjectURL(url); image.classList.toggle("coarse", image.naturalWidth < 100); };
  image.onerror = () => { URL.revokeObjectURL(url); if (state.file === file) image.parentElement.hidden = true; };
  image.src = url;
  image.parentElement.hidden = false;
  await answer();
}

async function answer() {
  if (!state.file) return;
  state.stop?.abort();
  const { signal } = state.stop = new AbortController();
  delete document.documentElement.dataset.shown;
  say("Asking…");
  try {
    const found = await Promise.all(chosen().map((model) => call("predict", { model, top_k: 5, mask: about(model).task === "image-segmentation" ? true : "" }, state.file, signal)));
    showAnswers(found);
    say("");
    state.found = found;
    const reasons = explainers(found), stories = storytellers();
    $("explain").hidden = !reasons.length;
    $("story").hidden = $("attention").hidden = !stories.length;
    if (reasons.length) showChoices(found.find((answer) => answer.model === reasons[0]));
    await Promise.all([reasons.length && explain(signal), stories.length && tell(signal)]);
    document.documentElement.dataset.shown = "yes";
  } catch (error) {
    if (error.name !== "AbortError" && state.answered !== state.file) $("results").hidden = true;  // they are another picture's
    trouble(error);
  }
}

function showAnswers(found) {
  state.answered = state.file;
  $("results").hidden = false;
  const best = found.map((answer) => answer.results[0]);
  const words = best.map((record, at) => `${found[at].model} ${verdict(record)}`);
  const compared = best.length > 1 && best.every((record) => record.predictions);
  const agree = compared && best[0].predictions[0]?.label === best[1].predictions[0]?.label;
  $("verdict").textContent = `${words.join("; ")}.${compared ? (agree ? " They agree." : " They disagree.") : ""}`;
  $("answers").replaceChildren(...found.map((answer, at) => {
    const bars = element("ol", { className: "bars" }, guesses(answer.results[0], about(answer.model).colours).map((guess) => {
      const fill = element("span", { className: "fill" });
      requestAnimationFrame(() => requestAnimationFrame(() => { fill.style.width = `${100 * guess.score}%`; }));
      const chip = element("span", { className: "chip", hidden: !guess.colour });
      if (guess.colour) { chip.style.background = guess.colour; fill.style.background = guess.colour; }
      return element("li", {}, [element("span", { className: "label", title: guess.label }, [chip, guess.label]),
        element("span", { className: "value", textContent: percent(guess.score) }),
        element("span", { className: "track", ariaHidden: "true" }, [fill])]);
    }));
    const save = element("button", { type: "button", className: "save", textContent: "Save answer (JSON)" });
    save.addEventListener("click", () => download(new Blob([JSON.stringify(answer, null, 2)], { type: "application/json" }), `${answer.model}.json`));
    const figure = findings(answer, best.length > 1 ? `${answer.model}-found-${at + 1}` : `${answer.model}-found`);
    return element("div", { className: at ? "second" : "first" }, [element("h3", { textContent: answer.model }), ...figure, bars, save]);
  }));
}

function findings(answer, name) {  // boxes or the mask over the picture
  const record = answer.results[0];
  if (!record.detections && !record.mask) return [];
  const canvas = element("canvas", { role: "img" }), save = element("button", { type: "button", className: "save", textContent: "Save picture" });
  save.addEventListener("click", () => saveCanvas(canvas, `${name}.png`));
  const figure = element("figure", { className: "found" }, [canvas, element("figcaption", {}, [element("span"), save])]);
  drawFindings(record, $("preview"), figure, about(answer.model).colours);
  return [figure];
}

function guesses(record, colours = []) {  // what bars show: classes, boxes by their score, or shares of the picture
  if (record.predictions) return record.predictions;
  if (record.classes) return record.classes.map(({ label, index, share }) => ({ label, score: share, colour: colours[index] }));
  return record.detections.map((box) => ({ label: box.label, score: box.score, colour: colours[box.index % colours.length] })).slice(0, 20);
}

function verdict(record) {
  if (record.detections) return record.detections.length ? `finds ${record.detections.length} object${record.detections.length > 1 ? "s" : ""}` : "finds nothing";
  const [first] = guesses(record);
  return record.classes ? `sees mostly ${first.label}, ${percent(first.score)} of the picture` : `says ${first.label}, ${percent(first.score)}`;
}

function showChoices({ model: name, results: [record] }) {
  const model = about(name), { methods } = model.explain, method = $("method").value, kept = $("class").value;
  $("method").replaceChildren(...methods.map((name) => new Option(name.replaceAll("_", " "), name)));
  $("method").value = methods.includes(method) ? method : model.explain.default;
  $("what").textContent = record.detections ? "box" : record.classes ? "region of" : "class";
  const seen = record.predictions ?? record.classes?.map(({ share, ...rest }) => ({ score: share, ...rest })) ?? [];
  const numbers = new Set(seen.map((guess) => guess.index)), rest = record.predictions ? model.labels.map((name, index) => [name, index]).filter(([, index]) => !numbers.has(index)) : [];
  $("class").replaceChildren(
    ...(record.detections ?? []).map((box, at) => new Option(`${at + 1}: ${box.label} (${percent(box.score)})`, at)),
    ...seen.map((guess) => new Option(`${guess.label} (${percent(guess.score)})`, guess.index)),
    ...rest.map(([name, index]) => new Option(name, index)));
  if (state.classOf === state.file && [...$("class").options].some((option) => option.value === kept)) $("class").value = kept;
  state.classOf = state.file;
  const { precision } = model;
  $("precision").textContent = precision === "fp32" ? "" : `Reasons and the story are computed in fp32, the answer above in ${precision}: shares may differ in their last digits.`;
}

function subject(name, first) {  // what of the picture a model is asked about
  const record = state.found.find((answer) => answer.model === name).results[0], value = $("class").value;
  if (name === first) return record.detections ? { box: value } : { index: value };  // a name may be another class's number
  const label = about(first).labels[value], index = about(name).labels.indexOf(label);
  return !state.found.find((answer) => answer.model === first).results[0].detections && index >= 0 && (record.predictions || record.classes?.some((one) => one.label === label)) ? { index } : {};
}

async function explain(signal, score = false) {
  const place = $("reasons");
  place.classList.add("busy");
  $("measure").disabled = true;
  if (score) say("Measuring: the picture is asked about some hundred times…");
  try {
    const names = explainers(state.found), method = $("method").value;
    const found = await Promise.allSettled(names.map((model) => call("explain", {
      model, score, method: about(model).explain.methods.includes(method) ? method : "auto", ...subject(model, names[0]) }, state.file, signal)));
    if (found[0].status === "rejected") throw found[0].reason;
    place.replaceChildren(...found.filter((one) => one.status === "fulfilled").map((one) => reason(one.value)));
    if (score) say("");
  } finally {
    if (!signal.aborted) { place.classList.remove("busy"); $("measure").disabled = false; }
  }
}

function reason(found) {
  const url = `data:image/png;base64,${found.overlay}`;
  const what = found.class_specific ? `${found.method.replaceAll("_", " ")} for ${found.box ? `the box of ${found.label}` : found.label}` : `${found.method.replaceAll("_", " ")} (knows no classes)`;
  const image = element("img", { src: url, alt: `Map over the picture: ${what}` });
  image.onload = () => image.classList.toggle("coarse", image.naturalWidth < 100);
  const save = element("button", { type: "button", className: "save", textContent: "Save picture" });
  save.addEventListener("click", () => download(blobOf(found.overlay), `${found.model}-${found.method}.png`));
  const parts = [];
  const rows = Object.entries(found.faithfulness).map(([fill, score]) => [fill, score.deletion, score.insertion, score.gap, found.controls[fill].random.gap, found.controls[fill].centre.gap]);
  if (rows.length) {
    const won = rows.filter((row) => row[3] > Math.max(row[4], row[5])).length;
    parts.push(element("p", { className: "meter" }, [element("strong", { textContent: `${won} of ${rows.length}` }), ` fills: better than a random map and than the middle of the picture.`]));
    parts.push(element("div", { className: "scroll", tabIndex: 0 }, [element("table", {}, [
      element("thead", {}, [element("tr", {}, ["fill", "deletion ↓", "insertion ↑", "gap", "random", "centre"].map((name, at) => element("th", { scope: "col", className: at ? "number" : "", textContent: name })))]),
      element("tbody", {}, rows.map((row) => element("tr", {}, row.map((cell, at) => element("td", { className: at ? "number" : "", textContent: at ? cell.toFixed(3) : cell })))))])]));
  }
  if (found.caution) parts.push(element("p", { className: "note", textContent: `${found.caution[0].toUpperCase()}${found.caution.slice(1)}.` }));
  return element("figure", {}, [
    element("div", {}, [element("h3", { textContent: `${found.model}: ${what}` }), image,
      element("figcaption", {}, [element("span", { textContent: `${found.units}; ${found.where}` }), save])]),
    element("div", {}, parts)]);
}

function blobOf(text) { return new Blob([Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0))], { type: "image/png" }); }

async function tell(signal) {
  const names = storytellers(), whose = names.includes($("whose").value) ? $("whose").value : names[0];
  $("whose").replaceChildren(...names.map((name) => new Option(name, name)));
  $("whose").value = whose;
  $("whose-label").hidden = names.length < 2;
  const told = await call("story", { model: whose, top_k: 5 }, state.file, signal);
  $("steps").replaceChildren(...told.steps.map((step) => element("tr", {}, [step.step, step.shape, step.note].map((text) => element("td", { textContent: text })))));
  await story.show(told);
  $("attention").hidden = !told.attention.length;
  if (told.attention.length) await attention.show(told);
}

function take(files) { const file = [...files].find((one) => one.type.startsWith("image/")) ?? files[0]; if (file) ask(file); }

function listen() {
  $("choose").addEventListener("click", () => $("file").click());
  $("shoot").addEventListener("click", () => $("camera").click());
  for (const id of ["file", "camera"]) $(id).addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
  const drop = $("drop");
  for (const name of ["dragenter", "dragover"]) document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => take(event.dataTransfer.files));
  document.addEventListener("paste", (event) => { if (event.clipboardData.files.length) take(event.clipboardData.files); });
  for (const id of ["model", "beside"]) $(id).addEventListener("change", () => answer());
  $("whose").addEventListener("change", () => tell(state.stop.signal).catch(trouble));
  for (const id of ["method", "class"]) $(id).addEventListener("change", () => explain(state.stop.signal).catch(trouble));
  $("measure").addEventListener("click", () => explain(state.stop.signal, true).catch(trouble));
  for (const button of document.querySelectorAll(".save")) button.addEventListener("click", () => saveCanvas($(button.dataset.of), `${$("whose").value}-${button.dataset.name}.png`));
  $("door").addEventListener("submit", (event) => {
    event.preventDefault();
    state.token = $("token").value.trim();
    sessionStorage.setItem("token", state.token);
    open().catch(trouble);
  });
  $("theme").addEventListener("click", () => {
    const root = document.documentElement, dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    story.draw(); attention.draw();
  });
}

listen();
open().catch(trouble);
