// What every patch attends to and who attends to it, in every layer and head: by pointer, touch and keyboard.
import { $, bytes, edges, element, heat, layMap, load, percent } from "./drawing.js";

const sum = (values) => values.reduce((a, b) => a + b, 0);
const largest = (values) => values.reduce((best, value, at) => value > values[best] ? at : best, 0);
const capital = (text) => text[0].toUpperCase() + text.slice(1);

export class Attention {
  constructor() {
    this.row = this.column = 0; this.token = null; this.held = false;
    const picture = $("patches");
    picture.addEventListener("pointermove", (event) => { if (!this.held && this.layers) this.move(...this.pointed(event)); });
    picture.addEventListener("click", (event) => { this.held = !(this.held && this.token === null); this.move(...this.pointed(event)); });
    picture.addEventListener("keydown", (event) => this.key(event));
    $("layer").addEventListener("input", () => this.turn());
    $("head").addEventListener("change", () => this.draw());
  }

  async show(told) {
    this.data = told.trace;
    this.layers = told.attention;
    this.image = await load(told.trace.image);
    this.zoom = Math.max(1, Math.ceil(448 / Math.max(this.data.width, this.data.height)));
    $("layer").max = this.layers.length - 1;
    $("layer").value = this.layers.length - 1;
    const at = this.at();
    [this.row, this.column, this.token, this.held, this.last] = [Math.floor(at.rows / 2), Math.floor(at.columns / 2), null, false, at];
    this.turn();
  }

  at() { return this.layers[Number($("layer").value)]; }

  weight(at, query, key) {  // the share of the query's attention that the key gets
    at.bytes ??= bytes(at.data);
    const head = $("head").value, from = head === "mean" ? 0 : Number(head), to = head === "mean" ? at.heads : from + 1;
    let total = 0;
    for (let h = from; h < to; h++) total += (at.bytes[(h * at.queries + query) * at.keys + key] / 255) ** 2;
    return total * at.most / (to - from);
  }

  ground(id, grey) {
    const canvas = $(id), context = canvas.getContext("2d");
    canvas.width = this.data.width * this.zoom; canvas.height = this.data.height * this.zoom;
    context.imageSmoothingEnabled = false;
    context.drawImage(this.image, 0, 0, canvas.width, canvas.height);
    if (grey) {
      context.globalCompositeOperation = "saturation"; context.fillStyle = "#808080"; context.fillRect(0, 0, canvas.width, canvas.height);
      context.globalCompositeOperation = "source-over";
    }
    return context;
  }

  edges(at) { return at.edges ??= edges([at.rows, at.columns], at.place, [this.data.height, this.data.width]); }

  box(at, row, column) {  // a cell of a layer's grid, in the canvas
    const [down, across] = this.edges(at), width = this.data.width * this.zoom, height = this.data.height * this.zoom;
    return [across[column] * width, down[row] * height, (across[column + 1] - across[column]) * width, (down[row + 1] - down[row]) * height];
  }

  frame(context, at) {
    if (this.token !== null) return;
    const area = this.box(at, this.row, this.column);
    context.lineWidth = 5; context.strokeStyle = "#000"; context.strokeRect(...area);
    context.lineWidth = 2.5; context.strokeStyle = "#fff"; context.strokeRect(...area);
  }

  lay(id, at, values, words) {
    const context = this.ground(id, true), most = Math.max(...values);
    context.globalAlpha = .78;
    const map = heat(values.map((value) => most ? 255 * value / most : 0), at.rows, at.columns, "looks");
    layMap(context, map, this.edges(at), [0, 0, context.canvas.width, context.canvas.height]);
    context.globalAlpha = 1;
    this.frame(context, at);
    this.words(id, words);
  }

  none(id, words) { this.ground(id, true); this.words(id, words); }
  words(id, words) { $(`${id}-words`).textContent = words; $(id).setAttribute("aria-label", words); }
  called(at, number) { return `the ${at.tokens[number] ?? `token ${number + 1} before the patches`}`; }

  draw() {
    if (!this.layers?.length) return;
    const at = this.at(), cells = at.rows * at.columns, { row, column, token } = this;
    const spot = token === null ? `row ${row + 1}, column ${column + 1}` : this.called(at, token);
    const picture = this.ground("patches", false);
    picture.strokeStyle = "rgba(255,255,255,.35)"; picture.lineWidth = 1;
    for (let r = 0; r < at.rows; r++) for (let c = 0; c < at.columns; c++) picture.strokeRect(...this.box(at, r, c));
    this.frame(picture, at);
    $("patches").setAttribute("aria-label", `The picture under ${at.rows} by ${at.columns} patches; ${spot}`);
    $("layer-name").textContent = `${Number($("layer").value) + 1} of ${this.layers.length}`;
    $("layer").setAttribute("aria-valuetext", at.name);
    const query = token === null ? at.prefix + row * at.columns + column : token;
    let said = `${at.name}, ${spot}`;
    if (query < at.queries) {
      const looks = Array.from({ length: cells }, (_, cell) => this.weight(at, query, at.keyPrefix + cell)), best = largest(looks);
      const kept = sum(Array.from({ length: at.keyPrefix }, (_, key) => this.weight(at, query, key)));
      const words = `attends most to row ${Math.floor(best / at.columns) + 1}, column ${best % at.columns + 1} (${percent(looks[best])})${kept > .0005 ? `; ${percent(kept)} to the tokens before the patches` : ""}.`;
      this.lay("looks", at, looks, `${capital(spot)} ${words}`);
      said += ` ${words}`;
    } else this.none("looks", "In this layer only the tokens before the patches attend to anything.");
    const key = token === null ? at.keyPrefix + row * at.columns + column : token < at.keyPrefix ? token : -1;
    if (key >= 0 && at.queries > at.prefix) {
      const seen = Array.from({ length: cells }, (_, cell) => this.weight(at, at.prefix + cell, key)), best = largest(seen);
      this.lay("seen", at, seen, `A patch gives it ${percent(sum(seen) / cells)} of its attention in the mean, at most ${percent(seen[best])} (row ${Math.floor(best / at.columns) + 1}, column ${best % at.columns + 1}).`);
    } else this.none("seen", "No patch attends to it in this layer.");
    $("told").textContent = this.held || document.activeElement === $("patches") ? said : "";
    $("tokens").querySelectorAll("button").forEach((button, number) => button.setAttribute("aria-pressed", String(number === token)));
  }

  turn() {  // another layer, at the same place of the picture
    const at = this.at(), before = this.last ?? at, head = $("head").value;
    if (before.rows !== at.rows || before.columns !== at.columns) {
      const y = (this.row + .5) * before.place[0] + before.place[2], x = (this.column + .5) * before.place[1] + before.place[3];
      this.row = Math.floor((y - at.place[2]) / at.place[0]); this.column = Math.floor((x - at.place[3]) / at.place[1]);
    }
    this.last = at;
    if (this.token !== null && this.token >= at.prefix) this.token = null;
    $("head").replaceChildren(new Option(`mean of ${at.heads}`, "mean"), ...Array.from({ length: at.heads }, (_, number) => new Option(number + 1, number)));
    $("head").value = head !== "" && Number(head) < at.heads ? head : "mean";
    $("tokens").replaceChildren(...Array.from({ length: at.prefix }, (_, number) => {
      const button = element("button", { type: "button", textContent: this.called(at, number) });
      button.addEventListener("click", () => { this.token = this.token === number ? null : number; this.held = this.token !== null; this.draw(); });
      return button;
    }));
    this.hold(this.row, this.column);
  }

  hold(row, column) {
    const at = this.at();
    this.row = Math.max(0, Math.min(at.rows - 1, row)); this.column = Math.max(0, Math.min(at.columns - 1, column));
    this.draw();
  }

  move(row, column) { this.token = null; this.hold(row, column); }

  pointed(event) {
    const at = this.at(), area = $("patches").getBoundingClientRect(), [scaleY, scaleX, shiftY, shiftX] = at.place;
    const y = (event.clientY - area.top) / area.height * this.data.height, x = (event.clientX - area.left) / area.width * this.data.width;
    return [Math.floor((y - shiftY) / scaleY), Math.floor((x - shiftX) / scaleX)];
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key], turn = { "+": 1, "=": 1, "-": -1 }[event.key];
    if (step) this.move(this.row + step[0], this.column + step[1]);
    else if (turn) { $("layer").value = Number($("layer").value) + turn; this.turn(); }
    else if (event.key === "Enter" || event.key === " ") { this.held = !this.held; this.draw(); }
    else if (event.key === "Escape") { this.held = false; this.token = null; this.draw(); }
    else return;
    event.preventDefault();
  }
}
