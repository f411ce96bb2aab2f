"use strict";
// Charts, sortable tables, and the live page. All text is set as text, never as markup.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 270, MARGIN = { left: 62, right: 14, top: 10, bottom: 40 }, COLORS = 10;
  const DASHES = ["", "7 4", "2 3", "9 3 2 3", "14 4"], MARKED = 30, SEVERAL = 4, FEW = 10, WIDE = 4;

  function node(parent, name, attributes = {}, text = null) {
    const made = parent.namespaceURI === SVG || name === "svg"
      ? document.createElementNS(SVG, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== null) made.textContent = text;
    parent.append(made);
    return made;
  }

  function shown(value) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return String(+value.toPrecision(4));
  }

  function linearTicks(low, high, count) {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= raw);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++)
      ticks.push(+(i * step).toPrecision(12));
    return ticks;
  }

  function logTicks(low, high) {
    const ticks = [];
    const factors = Math.log10(high / low) > 4 ? [1] : [1, 2, 5];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const factor of factors) ticks.push(factor * 10 ** power);
    return ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  }

  // The number of a line's colour and dashes.
  const look = (line, index) => line.color ?? index;

  class Chart {
    constructor(figure, data, kept = {}) {
      this.figure = figure;
      this.plot = figure.querySelector(".plot");
      this.hidden = kept.hidden || new Set();
      this.log = kept.log ?? data.log;
      this.zoom = kept.zoom || null;
      this.cursor = null;
      this.setData(data);
    }

    setData(data) {
      this.data = data;
      this.plot.replaceChildren();
      this.plot.classList.toggle("several", data.series.length > SEVERAL);
      this.plot.classList.toggle("many", data.series.length > FEW);
      this.area = node(this.plot, "div", { tabindex: 0, role: "group", "aria-roledescription": "chart" });
      this.area.setAttribute("aria-label",
        `${data.title}. Arrow keys move along the ${data.xLabel}, plus and minus zoom, Escape shows all.`);
      this.readout = node(this.plot, "div", { class: "readout", "aria-live": "polite" });
      const ys = data.series.flatMap((line) => line.y).filter((y) => y !== null);
      this.legend();
      const tools = node(this.plot, "div", { class: "tools" });
      if (Math.min(...ys) > 0 && Math.max(...ys) > WIDE * Math.min(...ys)) {
        this.scaleButton = node(tools, "button", { type: "button" });
        this.scaleButton.addEventListener("click", () => { this.log = !this.log; this.draw(); });
      } else this.log = false;
      this.allButton = node(tools, "button", { type: "button" }, "show all");
      this.allButton.addEventListener("click", () => { this.zoom = null; this.draw(); });
      this.numbers(tools);
      this.area.addEventListener("keydown", (event) => this.key(event));
      this.draw();
    }

    legend() {
      if (this.data.series.length < 2) return;
      const list = node(this.plot, "ul", { class: "legend" });
      this.data.series.forEach((line, i) => {
        const button = node(node(list, "li", { class: "item" }), "button", { type: "button", class: `ink${look(line, i) % COLORS}` });
        node(button, "span", {}, line.name);
        const press = () => button.setAttribute("aria-pressed", !this.hidden.has(line.name));
        button.addEventListener("click", () => {
          if (!this.hidden.delete(line.name)) this.hidden.add(line.name);
          press();
          this.draw();
        });
        press();
      });
    }

    numbers(tools) {
      const details = node(tools, "details");
      node(details, "summary", {}, "Numbers");
      details.addEventListener("toggle", () => {
        if (!details.open || details.querySelector("table")) return;
        const scroll = node(details, "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": this.data.title });
        const table = node(scroll, "table"), head = node(node(table, "thead"), "tr");
        for (const title of [this.data.xLabel, ...this.data.series.map((line) => line.name)])
          node(head, "th", { scope: "col", class: "number" }, title);
        const rows = new Map();
        this.data.series.forEach((line, i) => line.x.forEach((x, j) => {
          if (!rows.has(x)) rows.set(x, []);
          rows.get(x)[i] = line.y[j];
        }));
        const body = node(table, "tbody");
        for (const x of [...rows.keys()].sort((a, b) => a - b)) {
          const row = node(body, "tr");
          node(row, "th", { scope: "row", class: "number" }, shown(x));
          this.data.series.forEach((_, i) => node(row, "td", { class: "number" }, shown(rows.get(x)[i])));
        }
      });
    }

    lines() {
      return this.data.series.map((line, index) => ({ ...line, index, hue: look(line, index) })).filter((line) => !this.hidden.has(line.name));
    }

    draw() {
      const width = this.width = Math.max(300, this.area.clientWidth || 760);
      const lines = this.lines(), log = this.log;
      const xs = this.data.series.flatMap((line) => line.x);
      let [left, right] = this.zoom || [Math.min(...xs), Math.max(...xs)];
      if (left === right) { left -= 0.5; right += 0.5; }
      let low = Infinity, high = -Infinity;
      for (const line of lines)
        line.x.forEach((x, i) => {
          if (x < left || x > right) return;
          for (const y of [line.y[i], line.low?.[i], line.high?.[i]])
            if (y !== null && y !== undefined && (!log || y > 0)) { low = Math.min(low, y); high = Math.max(high, y); }
        });
      if (low > high) { low = log ? 0.1 : 0; high = 1; }
      if (this.data.limits && !this.zoom) [low, high] = this.data.limits;
      else if (log) { low /= 1.15; high *= 1.15; }
      else { const pad = (high - low || Math.abs(high) || 1) * 0.06; low -= low >= 0 && low - pad < 0 ? low : pad; high += pad; }
      const scale = (value) => log ? Math.log(value) : value;
      const X = this.X = (x) => MARGIN.left + (x - left) / (right - left) * (width - MARGIN.left - MARGIN.right);
      const bottom = HEIGHT - MARGIN.bottom;
      const Y = this.Y = (y) => bottom - (scale(y) - scale(low)) / (scale(high) - scale(low)) * (bottom - MARGIN.top);
      this.range = [left, right];
      const svg = document.createElementNS(SVG, "svg");
      for (const [key, value] of Object.entries({ viewBox: `0 0 ${width} ${HEIGHT}`, "aria-hidden": "true" })) svg.setAttribute(key, value);
      const clip = `clip-${this.figure.id}`;
      node(node(svg, "clipPath", { id: clip }), "rect",
        { x: MARGIN.left - 4, y: 0, width: width - MARGIN.left - MARGIN.right + 8, height: bottom + 4 });
      for (const tick of log ? logTicks(low, high) : linearTicks(low, high, 5)) {
        node(svg, "path", { class: "grid", d: `M${MARGIN.left} ${Y(tick)}H${width - MARGIN.right}` });
        node(svg, "text", { x: MARGIN.left - 8, y: Y(tick) + 4, "text-anchor": "end" }, shown(tick));
      }
      const whole = xs.every(Number.isInteger);
      for (const tick of linearTicks(left, right, Math.max(3, Math.floor(width / 110))).filter((t) => !whole || Number.isInteger(t)))
        node(svg, "text", { x: X(tick), y: bottom + 17, "text-anchor": "middle" }, shown(tick));
      node(svg, "path", { class: "axis", d: `M${MARGIN.left} ${bottom}H${width - MARGIN.right}` });
      node(svg, "text", { x: (MARGIN.left + width - MARGIN.right) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, this.data.xLabel);
      const inside = node(svg, "g", { "clip-path": `url(#${clip})` });
      for (const line of lines) this.band(inside, line);
      for (const line of lines) this.curve(inside, line);
      this.marks = node(svg, "g");
      this.area.replaceChildren(svg);
      if (this.scaleButton) this.scaleButton.textContent = log ? "linear scale" : "logarithmic scale";
      this.allButton.hidden = !this.zoom;
      this.pointers(svg);
      this.point();
    }

    points(line, ys) {
      const found = [];
      line.x.forEach((x, i) => { const y = ys[i]; if (y !== null && (!this.log || y > 0)) found.push([this.X(x).toFixed(1), this.Y(y).toFixed(1)]); });
      return found;
    }

    band(parent, line) {
      if (!line.low || !line.high) return;
      const edge = [...this.points(line, line.high), ...this.points(line, line.low).reverse()];
      if (edge.length > 2) node(parent, "path", { class: `band fill${line.hue % COLORS}`, d: `M${edge.join("L")}Z` });
    }

    curve(parent, line) {
      const path = this.points(line, line.y);
      if (!path.length) return;
      const drawn = node(parent, "path", { class: `curve ink${line.hue % COLORS}`, d: `M${path.join("L")}`, "data-name": line.index });
      if (this.data.series.length <= FEW) drawn.setAttribute("stroke-dasharray", DASHES[line.hue % DASHES.length]);
      if (path.length <= MARKED && this.data.series.length <= FEW)
        for (const [cx, cy] of path) node(parent, "circle", { cx, cy, r: 2.6, class: `fill${line.hue % COLORS}` });
    }

    pointers(svg) {
      const at = (event) => {
        const box = svg.getBoundingClientRect(), [left, right] = this.range;
        const pixel = (event.clientX - box.left) * this.width / box.width;
        const x = left + (pixel - MARGIN.left) / (this.width - MARGIN.left - MARGIN.right) * (right - left);
        return { x: Math.min(right, Math.max(left, x)), y: (event.clientY - box.top) * this.width / box.width };
      };
      let start = null, selection = null;
      svg.addEventListener("pointerdown", (event) => { start = at(event).x; });
      svg.addEventListener("pointermove", (event) => {
        const here = at(event);
        if (start !== null && event.buttons) {
          selection = selection || node(svg, "rect", { class: "selection", y: MARGIN.top, height: HEIGHT - MARGIN.top - MARGIN.bottom });
          selection.setAttribute("x", this.X(Math.min(start, here.x)));
          selection.setAttribute("width", Math.abs(this.X(here.x) - this.X(start)));
        }
        this.cursor = here.x;
        this.point(here.y);
      });
      svg.addEventListener("pointerup", (event) => {
        const end = at(event).x, dragged = selection && Math.abs(this.X(end) - this.X(start)) > 8;
        if (dragged) this.zoom = [Math.min(start, end), Math.max(start, end)];
        start = selection = null;
        if (dragged) this.draw();
      });
      svg.addEventListener("pointerleave", () => { this.cursor = null; start = null; this.point(); });
      svg.addEventListener("dblclick", () => { this.zoom = null; this.draw(); });
    }

    key(event) {
      if (event.target !== this.area) return;
      const [left, right] = this.range;
      const xs = [...new Set(this.lines().flatMap((line) => line.x))].filter((x) => x >= left && x <= right).sort((a, b) => a - b);
      if (event.key === "ArrowRight") this.cursor = xs.find((x) => this.cursor === null || x > this.cursor) ?? this.cursor;
      else if (event.key === "ArrowLeft") this.cursor = xs.findLast((x) => this.cursor === null || x < this.cursor) ?? this.cursor;
      else if (event.key === "+" || event.key === "=") {
        const middle = this.cursor ?? (left + right) / 2, half = (right - left) / 4;
        this.zoom = [middle - half, middle + half];
        this.draw();
      } else if (event.key === "-") {
        const half = right - left, middle = (left + right) / 2;
        this.zoom = [middle - half, middle + half];
        this.draw();
      } else if (event.key === "Escape") { this.zoom = null; this.cursor = null; this.draw(); }
      else return;
      event.preventDefault();
      this.point();
    }

    // The values nearest to the cursor; among many lines, that of the one line below the pointer.
    point(pointer = null) {
      this.marks.replaceChildren();
      this.readout.replaceChildren();
      if (this.cursor === null) {
        for (const path of this.area.querySelectorAll(".curve")) path.classList.remove("faded");
        return;
      }
      let found = [];
      for (const line of this.lines()) {
        let best = null;
        line.x.forEach((x, i) => {
          if (line.y[i] !== null && (best === null || Math.abs(x - this.cursor) < Math.abs(line.x[best] - this.cursor))) best = i;
        });
        if (best !== null) found.push({ line, x: line.x[best], y: line.y[best], low: line.low?.[best], high: line.high?.[best] });
      }
      if (!found.length) return;
      const nearest = found.reduce((a, b) => Math.abs(b.x - this.cursor) < Math.abs(a.x - this.cursor) ? b : a).x;
      if (this.data.series.length > FEW && pointer !== null) {
        found = [found.reduce((a, b) => Math.abs(this.Y(b.y) - pointer) < Math.abs(this.Y(a.y) - pointer) ? b : a)];
        for (const path of this.area.querySelectorAll(".curve"))
          path.classList.toggle("faded", path.dataset.name !== String(found[0].line.index));
      }
      node(this.marks, "path", { class: "cursor", d: `M${this.X(nearest)} ${MARGIN.top}V${HEIGHT - MARGIN.bottom}` });
      this.readout.append(`${this.data.xLabel} ${shown(nearest)}`);
      for (const item of found.slice(0, FEW)) {
        node(this.marks, "circle", { cx: this.X(item.x), cy: this.Y(item.y), r: 4, class: `fill${item.line.hue % COLORS}` });
        this.readout.append(`  ·  ${item.line.name} `);
        node(this.readout, "b", {}, shown(item.y));
        if (item.low !== null && item.low !== undefined && item.low !== item.high) this.readout.append(` (${shown(item.low)} to ${shown(item.high)})`);
      }
    }
  }

  const charts = new Map();
  function drawCharts(data) {
    for (const [id, values] of Object.entries(data)) {
      const figure = document.getElementById(id);
      if (figure) charts.set(id, new Chart(figure, values, charts.get(id)));
    }
  }

  function number(cell) {
    const text = (cell.querySelector("span") || cell).textContent.replace(/,/g, "");
    const value = parseFloat(text);
    return Number.isNaN(value) ? null : value;
  }

  function sortable(table) {
    const body = table.tBodies[0];
    if (!body || body.rows.length < 3) return;
    [...table.tHead.rows[0].cells].forEach((head, column) => {
      if (!head.textContent) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [a.cells[column], b.cells[column]], [p, q] = [number(x), number(y)];
          if (p === null && q === null) return x.textContent.localeCompare(y.textContent) * (down ? -1 : 1);
          if (p === null || q === null) return p === null ? 1 : -1;
          return (p - q) * (down ? -1 : 1);
        });
        body.append(...rows);
      });
    });
  }

  // What is below a part of the page that is new, or has just been replaced.
  function enliven(part) {
    for (const table of part.querySelectorAll("table")) sortable(table);
    for (const details of part.querySelectorAll("details"))
      details.addEventListener("toggle", () => { for (const chart of charts.values()) if (details.contains(chart.figure)) chart.draw(); });
  }

  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth === width) return;
    width = window.innerWidth;
    for (const chart of charts.values()) chart.draw();
  });

  // The live page: parts whose HTML has changed are replaced; charts keep their zoom.
  const PARTS = "#head, #contents, main > section";
  const told = new Map(), drawn = new Map();
  const main = document.getElementById("main");
  for (const part of document.querySelectorAll(PARTS)) told.set(part.id, part.outerHTML);

  function update({ body, charts: data }) {
    const fresh = new DOMParser().parseFromString(body, "text/html");
    let previous = null;
    for (const part of fresh.querySelectorAll(PARTS)) {
      const old = document.getElementById(part.id), text = part.outerHTML;
      if (told.get(part.id) !== text) {
        told.set(part.id, text);
        const open = old ? [...old.querySelectorAll("details[open][id]")].map((details) => details.id) : [];
        const made = document.adoptNode(part);
        if (old) old.replaceWith(made);
        else if (previous) previous.after(made);
        else main.prepend(made);
        for (const id of open) document.getElementById(id)?.setAttribute("open", "");
        for (const figure of made.querySelectorAll("figure")) drawn.delete(figure.id);
        enliven(made);
      }
      if (part.localName === "section") previous = document.getElementById(part.id);
    }
    const kept = new Set([...fresh.querySelectorAll(PARTS)].map((part) => part.id));
    for (const id of [...told.keys()]) if (!kept.has(id) && !body.includes(`id="${id}"`)) { document.getElementById(id)?.remove(); told.delete(id); }
    draw(data);
  }

  function draw(data) {
    for (const [id, values] of Object.entries(data)) {
      const text = JSON.stringify(values);
      if (drawn.get(id) === text) continue;
      drawn.set(id, text);
      drawCharts({ [id]: values });
    }
  }

  draw(JSON.parse(document.getElementById("charts").textContent));
  enliven(document);

  const version = document.documentElement.dataset.version;
  if (version !== undefined) {
    const live = document.getElementById("live");
    const say = (text) => { if (live.textContent !== text) live.textContent = text; };
    live.hidden = false;
    say("Live");
    const source = new EventSource(`events?version=${version}`);
    source.onopen = () => say("Live");
    source.onerror = () => say("The connection is lost; trying again.");
    source.onmessage = (event) => {
      const message = JSON.parse(event.data);
      update(message);
      if (message.ended) { source.close(); say("The run has ended."); }
    };
  }
})();
