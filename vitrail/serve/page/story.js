// The story of one picture: cut into patches, patches into tokens, tokens through the blocks, and the class at the end.
// Everything drawn was computed by the network for this picture; nothing is made up for show.
import { $, bytes, colour, css, edges, heat, layMap, load, percent, places, still } from "./drawing.js";

const MOST_PIECES = 784;  // finer grids are drawn in coarser pieces, or nothing could be told apart
const TONES = 16;  // colour cells of a token's bar
const ease = (u) => u <= 0 ? 0 : u >= 1 ? 1 : u * u * (3 - 2 * u);
const between = (time, [from, to]) => Math.max(0, Math.min(1, (time - from) / (to - from)));
const mix = (a, b, u) => a.map((value, at) => value + (b[at] - value) * u);
const SCENES = { whole: [0, .1], cut: [.1, .24], tokens: [.24, .44], prefix: [.44, .52], gather: [.52, .6], blocks: [.6, .88], end: [.88, 1] };

export class Story {
  constructor() {
    this.time = 0;
    this.canvas = $("stage");
    $("play").addEventListener("click", () => this.running ? this.pause() : this.play());
    $("time").addEventListener("input", () => { this.pause(); this.seek($("time").value / 1000); });
    new ResizeObserver(() => this.draw()).observe(this.canvas);
  }

  async show(told) {
    this.pause();
    const data = told.trace, first = data.stages[0];
    this.told = told; this.data = data;
    this.image = await load(data.image);
    this.size = [data.height, data.width];
    this.several = 1;  // rows and columns of cells that are drawn as one piece
    while (Math.ceil(first.grid[0] / this.several) * Math.ceil(first.grid[1] / this.several) > MOST_PIECES) this.several *= 2;
    [this.rows, this.columns] = first.grid.map((cells) => Math.ceil(cells / this.several));
    this.count = this.rows * this.columns;
    const pieces = (places) => places.filter((_, at) => at % this.several === 0 || at === places.length - 1);
    this.edges = edges(first.grid, data.place, this.size).map(pieces);
    this.apart = places(first.grid, data.place, this.size).map(pieces);  // of one size, to be shown with what hangs over
    this.bars = this.tokenBars(first);
    this.layers = data.layers.map((layer) => this.layer(layer));
    this.prefix = data.stages.find((stage) => stage.prefix.length)?.prefix ?? [];
    this.seek(0);
    if (still()) this.seek(1); else this.play();
  }

  window(piece) {  // x, y, width, height of the pixels that a piece is made of: neighbours may share some, and it may hang over
    const { data, several } = this, grid = data.stages[0].grid;
    const [[y, h], [x, w]] = [Math.floor(piece / this.columns), piece % this.columns].map((number, axis) => {
      const first = number * several, last = Math.min(grid[axis], first + several) - 1;
      return [first * data.step[axis] + data.corner[axis], (last - first) * data.step[axis] + data.patch[axis]];
    });
    return [x, y, w, h];
  }

  tokenBars({ grid, embeddings: { shape: [, channels], data } }) {  // one column of colours a piece: of its first token
    const values = bytes(data), tones = Math.min(TONES, channels), columns = this.count;
    const out = new Float32Array(tones * columns);
    for (let token = 0; token < columns; token++) for (let tone = 0; tone < tones; tone++) {
      const row = (Math.floor(token / this.columns) * grid[1] + token % this.columns) * this.several, from = Math.floor(tone * channels / tones);
      out[tone * columns + token] = values[row * channels + from];
    }
    return heat(out, tones, columns, "signed");
  }

  layer(layer) {
    const [rows, columns] = layer.grid, made = { name: layer.name, map: heat(bytes(layer.component.data), rows, columns, "like"), lines: [], gaze: layer.gaze, place: layer.place };
    made.edges = edges(layer.grid, layer.place, this.size);
    if (layer.gaze) {
      const [h, w] = layer.gaze.grid, all = bytes(layer.gaze.data), mean = new Float32Array(h * w);
      all.forEach((value, at) => { mean[at % (h * w)] += value / layer.gaze.heads; });
      const most = Math.max(...mean) || 1;
      const middle = (number, axis) => Math.min(1, ((number + .5) * layer.place[axis] + layer.place[axis + 2]) / this.size[axis]);
      made.lines = [...mean.keys()].sort((a, b) => mean[b] - mean[a]).slice(0, 14).map((at) => ({ y: middle(Math.floor(at / w), 0), x: middle(at % w, 1), share: mean[at] / most }));
    }
    return made;
  }

  play() {
    if (this.time >= 1) this.time = 0;
    this.running = true;
    $("play").textContent = "Pause";
    let last = null;
    const step = (now) => {
      if (!this.running) return;
      if (last !== null) this.seek(Math.min(1, this.time + (now - last) / (11_000 + 500 * this.layers.length)));
      last = now;
      if (this.time >= 1) this.pause(); else requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  pause() { this.running = false; $("play").textContent = this.time >= 1 ? "Play again" : "Play"; }

  seek(time) {
    this.time = time;
    $("time").value = Math.round(1000 * time);
    if (!this.running) $("play").textContent = time >= 1 ? "Play again" : "Play";
    const words = this.words();
    if ($("scene").textContent !== words) { $("scene").textContent = words; $("time").setAttribute("aria-valuetext", words); }
    this.draw();
  }

  block() { return Math.min(this.layers.length - 1, Math.floor(between(this.time, SCENES.blocks) * this.layers.length)); }

  words() {
    const { data, told, time } = this, { words } = data, first = data.stages[0], best = data.top[0];
    if (time < SCENES.cut[0]) return `The network sees ${data.height} × ${data.width} pixels of the picture.`;
    if (time < SCENES.tokens[0]) return `They are ${/ (cut|read) /.exec(words.cut)?.[1] ?? "seen"} as ${first.grid[0]} × ${first.grid[1]} ${words.pieces} of ${data.patch[0]} × ${data.patch[1]} pixels${data.far}${this.several > 1 ? `; here ${this.several} × ${this.several} of them go together` : ""}.`;
    if (time < SCENES.prefix[0]) return `${words.made}: ${first.channels} numbers each, here in colours.`;
    if (time < SCENES.blocks[0]) return this.prefix.length ? `${this.prefix.join(" and ")} ${this.prefix.length > 1 ? "are" : "is"} put in front; nothing of the picture is in ${this.prefix.length > 1 ? "them" : "it"} yet.` : `${words.blocks}.`;
    if (time < SCENES.end[0] && this.layers.length) {
      const layer = this.layers[this.block()], gaze = layer.gaze;
      const lines = !gaze ? "" : gaze.kind === "strength" ? "; lines go to where it answers most strongly" : `; lines show what ${gaze.token ? this.prefix[0] ?? "the first token" : "the average token"} attends to most`;
      return `${layer.name[0].toUpperCase()}${layer.name.slice(1)} of ${this.layers.length}: alike colours are alike ${words.items}${lines}.`;
    }
    return `The last vector becomes probabilities: ${best.label}, ${percent(best.score)}.`;
  }

  layout() {
    const ratio = window.devicePixelRatio || 1, { clientWidth: w, clientHeight: h } = this.canvas;
    this.canvas.width = Math.round(w * ratio); this.canvas.height = Math.round(h * ratio);
    const tall = w < h * 1.35, side = tall ? Math.min(w * .7, h * .58) : Math.min(h * .86, w * .42);
    const shape = this.data.height / this.data.width, wide = shape > 1 ? side / shape : side, high = shape > 1 ? side : side * shape;
    const room = tall ? 0 : w * .19 * (1 - ease(between(this.time, [SCENES.end[0], .94])));  // in the middle until the bars come
    const square = { x: tall ? (w - wide) / 2 : room + w * .05 + (w * .45 - wide) / 2, y: tall ? h * .05 : (h - high) / 2, w: wide, h: high };
    return { w, h, ratio, tall, square };
  }

  draw() {
    if (!this.data || !this.canvas.clientWidth) return;
    const at = this.layout(), context = this.canvas.getContext("2d");
    context.setTransform(at.ratio, 0, 0, at.ratio, 0, 0);
    context.clearRect(0, 0, at.w, at.h);
    context.imageSmoothingEnabled = false;
    if (this.time < SCENES.blocks[0]) this.drawPieces(context, at); else this.drawBlocks(context, at);
    this.drawPrefix(context, at);
    if (this.time >= SCENES.end[0]) this.drawEnd(context, at);
  }

  cell(square, piece, [rows, columns] = this.edges, apart = 0) {  // where a piece lies in the picture, with a gap between pieces
    const row = Math.floor(piece / this.columns), column = piece % this.columns, grow = 1 + .16 * apart;
    const along = (start, side, from, to) => [start + side / 2 + (from - .5) * side * grow, (to - from) * side];
    const [x, w] = along(square.x, square.w, columns[column], columns[column + 1]), [y, h] = along(square.y, square.h, rows[row], rows[row + 1]);
    return [x, y, w, h];
  }

  ribbon({ w, h }, piece) {  // where a token lies in the lines of tokens
    const lines = Math.max(1, Math.round(Math.sqrt(this.count * h / w / 3.2))), length = Math.ceil(this.count / lines);
    const line = Math.floor(piece / length), place = piece % length, stepX = w * .94 / length, stepY = h * .9 / lines;
    return [w * .03 + place * stepX, h * .05 + line * stepY, Math.max(1, stepX * .72), stepY * .8];
  }

  drawPieces(context, at) {
    const { image, count } = this, cut = ease(between(this.time, SCENES.cut)), away = between(this.time, SCENES.tokens), back = between(this.time, SCENES.gather);
    const first = this.layers[0], [height, width] = this.size, { square } = at;
    if (!cut) { context.drawImage(image, square.x, square.y, square.w, square.h); return; }
    for (let piece = 0; piece < count; piece++) {
      const go = ease(Math.max(0, Math.min(1, away * 1.9 - .9 * piece / count))), home = ease(Math.max(0, Math.min(1, back * 1.6 - .6 * piece / count)));
      // A piece starts over its own pixels. Where windows share some, each shrinks to its cell and takes all of them along.
      const pixels = this.window(piece), over = [square.x + pixels[0] / width * square.w, square.y + pixels[1] / height * square.h, pixels[2] / width * square.w, pixels[3] / height * square.h];
      let [x, y, w, h] = mix(mix(over, this.cell(square, piece, this.apart, 1), cut), this.ribbon(at, piece), go);
      if (home) [x, y, w, h] = mix([x, y, w, h], this.cell(square, piece), home);
      context.globalAlpha = 1 - go;
      if (go < 1) context.drawImage(image, ...pixels, x, y, w, h);
      context.globalAlpha = go * (1 - home);
      if (go && home < 1) context.drawImage(this.bars, piece, 0, 1, this.bars.height, x, y, w, h);
      context.globalAlpha = home;
      if (home && first) this.tile(context, first, piece, x, y, w, h);
    }
    context.globalAlpha = 1;
  }

  tile(context, { map, place }, piece, x, y, w, h) {  // the cell of a layer's map over the middle of a piece
    const [row, column] = [[Math.floor(piece / this.columns), map.height], [piece % this.columns, map.width]].map(([number, cells], axis) => {
      const middle = (this.edges[axis][number] + this.edges[axis][number + 1]) / 2 * this.size[axis];
      return Math.max(0, Math.min(cells - 1, Math.floor((middle - place[axis + 2]) / place[axis])));
    });
    context.drawImage(map, column, row, 1, 1, x, y, w + .5, h + .5);
  }

  lay(context, { map, edges }, { square, ratio }) { layMap(context, map, edges, [square.x, square.y, square.w, square.h], ratio); }

  drawBlocks(context, at) {
    const { square } = at;
    if (!this.layers.length) { context.drawImage(this.image, square.x, square.y, square.w, square.h); return; }
    const place = between(this.time, SCENES.blocks) * this.layers.length, number = Math.min(this.layers.length - 1, Math.floor(place)), share = ease(Math.min(1, 2.5 * (place - number)));
    if (number) this.lay(context, this.layers[number - 1], at);
    context.globalAlpha = number ? share : 1;
    this.lay(context, this.layers[number], at);
    context.globalAlpha = 1;
  }

  spot({ square, tall, w, h }) {  // where the class token stands
    return tall ? [w / 2, square.y + square.h + h * .09] : [square.x + square.w + w * .09, square.y + square.h / 2];
  }

  drawPrefix(context, at) {
    const shown = ease(between(this.time, SCENES.prefix)), [x, y] = this.spot(at), radius = Math.max(9, at.w * .02);
    const inBlocks = this.time >= SCENES.blocks[0];
    if (!this.prefix.length && !inBlocks) return;
    if (!shown) return;
    context.globalAlpha = shown;
    if (inBlocks && this.layers.length && this.time < SCENES.end[0] + .03) {
      const layer = this.layers[this.block()];
      context.strokeStyle = colour("--mark");
      for (const { x: lx, y: ly, share } of layer.lines) {
        context.globalAlpha = .15 + .75 * share; context.lineWidth = .5 + 2.5 * share;
        context.beginPath(); context.moveTo(x, y); context.lineTo(at.square.x + lx * at.square.w, at.square.y + ly * at.square.h); context.stroke();
      }
    }
    context.globalAlpha = shown;
    context.fillStyle = colour("--mark"); context.strokeStyle = colour("--paper"); context.lineWidth = 2;
    context.beginPath(); context.arc(x, y, radius, 0, 2 * Math.PI); context.fill(); context.stroke();
    context.fillStyle = colour("--ink"); context.font = "600 13px system-ui, sans-serif"; context.textAlign = "center";
    context.fillText(this.prefix.slice(0, 2).join(" ") || "mean", x, y + radius + 16);
    context.globalAlpha = 1;
  }

  drawEnd(context, at) {
    const shown = ease(between(this.time, [SCENES.end[0], .97])), [sx, sy] = this.spot(at), top = this.data.top;
    const x = at.tall ? at.w * .06 : sx + at.w * .07, width = at.tall ? at.w * .88 : at.w - x - 12, y = at.tall ? sy + at.h * .09 : at.h * .12;
    const step = (at.h - y) / (top.length + .3);
    context.font = `${Math.max(12, Math.min(17, step * .36))}px system-ui, sans-serif`;
    top.forEach((guess, number) => {
      const line = y + number * step, tallness = Math.min(18, step * .34);
      context.globalAlpha = shown;
      context.fillStyle = colour("--ink"); context.textAlign = "left";
      const value = percent(guess.score), room = width - context.measureText(value).width - 12;
      let label = guess.label;
      while (label.length > 2 && context.measureText(label).width > room) label = label.slice(0, -2);
      context.fillText(label === guess.label ? label : `${label}…`, x, line + step * .3);
      context.textAlign = "right"; context.fillText(value, x + width, line + step * .3);
      context.fillStyle = colour("--pane"); context.fillRect(x, line + step * .4, width, tallness);
      context.fillStyle = colour("--bar"); context.fillRect(x, line + step * .4, Math.max(2, width * guess.score * shown), tallness);
    });
    context.globalAlpha = 1;
  }
}
