// Boxes and masks over the picture, for models that find them.
import { load } from "./drawing.js";

export async function drawFindings(record, image, figure, colours) {
  await image.decode().catch(() => null);
  const canvas = figure.querySelector("canvas"), context = canvas.getContext("2d"), scale = Math.max(1, Math.ceil(640 / Math.max(record.width, record.height)));
  canvas.width = record.width * scale; canvas.height = record.height * scale;
  context.drawImage(image, 0, 0, canvas.width, canvas.height);
  if (record.mask) {
    context.globalAlpha = .55; context.imageSmoothingEnabled = false;
    context.drawImage(await load(`data:image/png;base64,${record.mask}`), 0, 0, canvas.width, canvas.height);
    context.globalAlpha = 1;
  }
  const line = Math.max(2, canvas.width / 320), boxes = record.detections ?? [];
  context.font = `600 ${Math.max(12, canvas.width / 45)}px system-ui, sans-serif`;
  for (const box of [...boxes].reverse()) {
    const [x, y, w, h] = box.bbox.map((value) => value * scale), paint = colours[box.index % colours.length];
    context.lineWidth = line; context.strokeStyle = paint; context.strokeRect(x, y, w, h);
    const text = `${box.label} ${(100 * box.score).toFixed(0)}`, high = Math.max(14, canvas.width / 38);
    context.fillStyle = paint; context.fillRect(x - line / 2, Math.max(0, y - high), context.measureText(text).width + 8, high);
    context.fillStyle = "#fff"; context.fillText(text, x + 3, Math.max(high, y) - high * .25);
  }
  const words = record.detections ? boxes.map((box) => `${box.label} ${(100 * box.score).toFixed(0)} %`).join(", ") || "nothing found" : record.classes.map(({ label, share }) => `${label} ${(100 * share).toFixed(1)} %`).join(", ");
  figure.querySelector("span").textContent = words;
  canvas.setAttribute("aria-label", `The picture with what was found: ${words}`);
}
