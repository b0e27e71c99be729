"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const FIRST = 24;
  root.classList.add("js");

  const cards = all(".card").map((node, place) => ({
    node, place, tag: node.dataset.tag, means: JSON.parse(node.dataset.means),
  }));
  const control = name => one(`#${name}`);
  const value = (name, otherwise) => control(name)?.value ?? otherwise;
  const count = one("#count"), more = one("#more"), list = one(".cards");
  let shown = FIRST;

  // The gain of the right side over the left one, or null if a score is missing.
  const gain = card => {
    const reward = +value("reward", 0);
    const left = card.means[+value("left", 0)]?.[reward], right = card.means[+value("right", 1)]?.[reward];
    return left == null || right == null ? null : right - left;
  };

  const arrange = () => {
    const sort = value("sort", "order"), tag = value("tag", "");
    const sign = sort === "gain" ? -1 : sort === "loss" ? 1 : 0;
    const rank = card => { const g = gain(card); return g === null ? Infinity : sign * g; };
    const ordered = sign ? [...cards].sort((a, b) => rank(a) - rank(b) || a.place - b.place) : cards;
    const chosen = ordered.filter(card => !tag || card.tag === tag);
    const visible = new Set(chosen.slice(0, shown));
    for (const card of ordered) {
      card.node.hidden = !visible.has(card);
      list.append(card.node);
    }
    const total = chosen.length;
    count.textContent = `${visible.size} of ${total} ${total === 1 ? "prompt" : "prompts"}`;
    more.hidden = visible.size === total;
    more.textContent = `Show all ${total}`;
  };

  const place = () => {
    const left = value("left", "0"), right = value("right", "1");
    for (const { node } of cards) {
      for (const side of all(".side", node)) {
        const is = { left: side.dataset.side === left, right: side.dataset.side === right };
        side.classList.toggle("left", is.left);
        side.classList.toggle("right", is.right && !is.left);
        side.classList.toggle("on", is.left || is.right);
      }
    }
  };

  for (const pair of all(".pair")) {
    const input = one("input", pair);
    if (!input) continue;
    const cut = () => pair.style.setProperty("--cut", `${input.value}%`);
    input.addEventListener("input", cut);
    cut();
  }
  if (cards.length) {
    for (const name of ["left", "right", "reward", "sort", "tag"]) {
      control(name)?.addEventListener("change", () => { shown = FIRST; place(); arrange(); });
    }
    more.addEventListener("click", () => { shown = Infinity; arrange(); });
    // Paper shows every prompt of the present choice.
    window.addEventListener("beforeprint", () => { shown = Infinity; arrange(); all("details").forEach(d => { d.open = true; }); });
    place();
    arrange();
  }

  const data = JSON.parse(one("#data").textContent);
  const number = x => Math.abs(x) >= 10000 ? Math.round(x).toLocaleString("en") : String(+x.toPrecision(4));
  all(".curve").forEach((figure, index) => {
    const curve = data.curves[index], svg = one("svg", figure), tip = one(".tip", figure), cursor = one(".cursor", svg);
    const places = curve.lines.flatMap(line => line.places.map(p => p[0]));
    const stops = [...new Set(places)].sort((a, b) => a - b);
    let at = stops.length - 1;
    const nearest = (line, x) => line.places.reduce((best, p, i) => Math.abs(p[0] - x) < Math.abs(line.places[best][0] - x) ? i : best, 0);
    const show = x => {
      const rows = curve.lines.map(line => {
        const [along, y, step] = line.points[nearest(line, x)];
        const where = curve.axis === "step" ? `step ${number(step)}` : `step ${number(step)}, ${number(along)} images`;
        return `${curve.lines.length > 1 ? line.label + ", " : ""}${where}: ${number(y)}`;
      });
      cursor.setAttribute("x1", x); cursor.setAttribute("x2", x); cursor.removeAttribute("hidden");
      tip.replaceChildren(...rows.map(text => Object.assign(document.createElement("div"), { textContent: text })));
      tip.hidden = false;
      const half = x > data.width / 2;
      tip.style.left = half ? "auto" : `${100 * x / data.width + 2}%`;
      tip.style.right = half ? `${100 - 100 * x / data.width + 2}%` : "auto";
    };
    const hide = () => { tip.hidden = true; cursor.setAttribute("hidden", ""); };
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * data.width / box.width;
      at = stops.reduce((best, p, i) => Math.abs(p - x) < Math.abs(stops[best] - x) ? i : best, 0);
      show(stops[at]);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => show(stops[at]));
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", event => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move) return;
      event.preventDefault();
      at = Math.min(stops.length - 1, Math.max(0, at + move));
      show(stops[at]);
    });
  });

  for (const button of all(".snippet button")) {
    button.addEventListener("click", async () => {
      const text = one("pre", button.parentElement);
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "Copied";
      } catch {
        // Some browsers keep the clipboard from pages that were opened from a file.
        getSelection().selectAllChildren(text);
        button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
      }
    });
  }
})();
