// Boxes and masks over the picture, for models that find them.
import { element, css, load } from "./drawing.js";

export async function drawFindings(record, image) {
  image.parentElement.querySelector("canvas")?.remove();
  const boxes = record.boxes ?? [];
  if (!boxes.length && !record.mask) return;
  await image.decode().catch(() => null);
  const canvas = element("canvas", { width: image.naturalWidth, height: image.naturalHeight, role: "img", ariaLabel: `${boxes.length} boxes` });
  const context = canvas.getContext("2d");
  if (record.mask) { context.globalAlpha = .55; context.imageSmoothingEnabled = false; context.drawImage(await load(`data:image/png;base64,${record.mask}`), 0, 0, canvas.width, canvas.height); context.globalAlpha = 1; }
  const line = Math.max(1.5, canvas.width / 220);
  for (const box of boxes) {
    const [x, y, w, h] = box.bbox, paint = css("like", (box.category_id * 67) % 256);
    context.lineWidth = 2 * line; context.strokeStyle = "#000"; context.strokeRect(x, y, w, h);
    context.lineWidth = line; context.strokeStyle = paint; context.strokeRect(x, y, w, h);
  }
  image.parentElement.append(canvas);
}
