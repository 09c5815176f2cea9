// What all parts of the page draw with: elements, colours, bytes, downloads.
export const $ = (id) => document.getElementById(id);
export const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
export const percent = (share) => `${(100 * share).toFixed(share > 0 && share < .0095 ? 2 : 1)} %`;
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
export const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;

export function element(name, fields = {}, children = []) {
  const made = Object.assign(document.createElement(name), fields);
  made.append(...children);
  return made;
}

const SCALES = {  // inferno, viridis, PuOr: even in lightness, apart for every kind of eye
  looks: "000004 160b39 420a68 6a176e 932667 bc3754 dd513a f37819 fca50a f6d746 fcffa4",
  like: "440154 482475 414487 355f8d 2a788e 21918c 22a884 44bf70 7ad151 bddf26 fde725",
  signed: "2d004b 532687 8073ac b1aad1 d8daeb f7f7f6 fee0b6 fcb761 e08214 b25706 7f3b08",
};
const TABLES = Object.fromEntries(Object.entries(SCALES).map(([name, stops]) => {
  const colours = stops.split(" ").map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));
  const table = new Uint8Array(768);
  for (let value = 0; value < 256; value++) {
    const at = value / 255 * (colours.length - 1), low = Math.min(Math.floor(at), colours.length - 2);
    for (let c = 0; c < 3; c++) table[3 * value + c] = colours[low][c] + (at - low) * (colours[low + 1][c] - colours[low][c]);
  }
  return [name, table];
}));

export function css(scale, value) {  // value 0..255
  const at = 3 * Math.max(0, Math.min(255, Math.round(value))), table = TABLES[scale];
  return `rgb(${table[at]},${table[at + 1]},${table[at + 2]})`;
}

export function heat(values, rows, columns, scale) {  // a small canvas, one pixel a value of 0..255
  const canvas = element("canvas", { width: columns, height: rows }), picture = new ImageData(columns, rows), table = TABLES[scale];
  for (let i = 0; i < rows * columns; i++) {
    const at = 3 * Math.max(0, Math.min(255, Math.round(values[i])));
    picture.data.set(table.subarray(at, at + 3), 4 * i);
    picture.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(picture, 0, 0);
  return canvas;
}

// Where the rows and columns of a grid begin and the last ones end, in shares of the picture.
export function places(grid, place, size) {
  return grid.map((cells, axis) => Array.from({ length: cells + 1 }, (_, at) => (at * place[axis] + place[axis + 2]) / size[axis]));
}

// The same within the picture: the outermost go on to its border.
export function edges(grid, place, size) {
  return places(grid, place, size).map((found) => found.map((at, number) => number === 0 ? 0 : number === found.length - 1 ? 1 : Math.max(0, Math.min(1, at))));
}

// A map of one pixel a cell, each cell over its share of an area. The outermost differ in size, so it goes in up to nine parts.
export function layMap(context, map, [down, across], [x, y, w, h], ratio = 1) {
  const whole = (place) => Math.round(place * ratio) / ratio;  // no seams between the parts
  const parts = (places, start, side) => [...new Set([0, 1, places.length - 2, places.length - 1])].sort((a, b) => a - b)
    .map((from, at, all) => [from, all[at + 1] - from, whole(start + places[from] * side), whole(start + places[all[at + 1]] * side)]).slice(0, -1);
  for (const [top, high, upper, lower] of parts(down, y, h)) for (const [left, wide, begin, end] of parts(across, x, w))
    context.drawImage(map, left, top, wide, high, begin, upper, end - begin, lower - upper);
}

export async function load(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

export function download(blob, name) {
  const url = URL.createObjectURL(blob), link = element("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function saveCanvas(canvas, name) { canvas.toBlob((blob) => download(blob, name), "image/png"); }
