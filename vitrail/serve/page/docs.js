// The list of routes, drawn from the service's own OpenAPI file.
import { $, element } from "./drawing.js";

const code = (text) => element("code", { textContent: text });
const row = (cells) => element("tr", {}, cells.map((cell) => element("td", {}, [cell])));
const table = (heads, rows) => element("div", { className: "scroll", tabIndex: 0 }, [element("table", {}, [
  element("thead", {}, [element("tr", {}, heads.map((head) => element("th", { scope: "col", textContent: head })))]),
  element("tbody", {}, rows)])]);

function kind(schema) {
  const range = "minimum" in schema ? ` ${schema.minimum} to ${schema.maximum}` : "";
  return `${[schema.type].flat().join(" or ")}${range}${"default" in schema ? `, by default ${schema.default}` : ""}`;
}

function example(path, method, route) {
  const url = `${location.origin}${path}`;
  if (method === "get") return `curl ${url}`;
  const body = route.requestBody?.content ?? {}, most = body["multipart/form-data"]?.schema.properties.image.maxItems;
  const files = most === 1 ? "-F image=@one.jpg" : "-F image=@one.jpg -F image=@two.png";
  return "image/jpeg" in body ? `curl --data-binary @photo.jpg -H 'content-type: image/jpeg' ${url}\ncurl ${files} ${url}` : `curl -d @request.json -H 'content-type: application/json' ${url}`;
}

const answer = await fetch("openapi.json"), spec = await answer.json();
$("about").textContent = spec.info.description;
for (const [path, methods] of Object.entries(spec.paths)) for (const [method, route] of Object.entries(methods)) {
  const parts = [element("h2", {}, [`${method.toUpperCase()} `, code(path)]), element("p", { textContent: `${route.summary}.` }), element("pre", { textContent: example(path, method, route) })];
  const given = route.parameters ?? [];
  if (given.length) parts.push(table(["parameter", "in", "what", "kind"], given.map((one) => row([code(one.name), one.in, one.description ?? "", kind(one.schema)]))));
  parts.push(element("details", {}, [element("summary", { textContent: "Answers" }),
    table(["status", "what"], Object.entries(route.responses).map(([status, told]) => row([code(status), told.description])))]));
  $("routes").append(element("article", {}, parts));
}
document.documentElement.dataset.ready = "yes";
