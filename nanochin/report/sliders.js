// Compute, served tokens and unique text by sliders, with the formulas of nanochin/laws: cost.py, law.py (f has the
// constants of a law), allocation.py and published.py. columns, at, beyond, count, number and three are of report.js.
const id = name => document.getElementById(name);
const data = JSON.parse(id("sliders").textContent), own = data.law, {c, q, s} = data.cost;

const R = N => (1 + c * N ** -q) ** s, tokens = (N, C) => C / (6 * N * R(N)), flops = (N, D) => 6 * N * D * R(N);
const p = N => 1 - s * q * c * N ** -q / (1 + c * N ** -q); // d log(N R) / d log N
const terms = (f, N, D) => f.A * N ** -f.alpha + f.B * D ** -f.beta;
const loss = (f, N, D) => f.E + terms(f, N, D) ** f.gamma;

function fixedPoint(size, N = size(1, 1), rounds = 200) { // N = size(R, p)
  const next = size(R(N), p(N));
  return rounds && Math.abs(next - N) > 1e-12 * N ? fixedPoint(size, next, rounds - 1) : next;
}

function bisect(tooLarge, low, high, rounds = 60) { // in logs
  if (!rounds) return Math.exp(high);
  const middle = (low + high) / 2, [from, to] = tooLarge(Math.exp(middle)) ? [low, middle] : [middle, high];
  return bisect(tooLarge, from, to, rounds - 1);
}

function optimal(f, C) {
  const sum = f.alpha + f.beta, G = (f.alpha * f.A / (f.beta * f.B)) ** (1 / sum);
  const N = fixedPoint((R, p) => G * p ** (-1 / sum) * (C / (6 * R)) ** (f.beta / sum));
  return [N, tokens(N, C)];
}

function toServe(f, C, served) { // the optimal loss of C at the lowest compute of training and serving
  const [N, D] = optimal(f, C), wanted = terms(f, N, D);
  const reaching = n => (Math.max(wanted - f.A * n ** -f.alpha, 0) / f.B) ** (-1 / f.beta);
  const ratio = n => f.alpha * f.A * n ** -f.alpha / (f.beta * f.B * reaching(n) ** -f.beta);
  const tooLarge = n => p(n) * (1 + served / (3 * reaching(n))) > ratio(n);
  const n = bisect(tooLarge, Math.log(f.A / wanted) / f.alpha, Math.log(N)), d = reaching(n);
  return [n, d, Math.max(1 - flops(n, d + served / 3) / flops(N, D + served / 3), 0)];
}

function repeatedLoss(f, N, D, unique) { // Muennighoff et al. 2023
  const worth = (total, U, decay) => U * (1 + decay * (1 - Math.exp(-(total / U - 1) / decay)));
  const U = Math.min(D, unique), scale = f.alpha * f.A / (f.beta * f.B) * U ** f.beta;
  const enough = fixedPoint((R, p) => (scale / p) ** (1 / f.alpha));
  return loss(f, worth(N, Math.min(N, enough), data.R_N), worth(D, U, data.R_D));
}

function withText(f, C, unique) { // by golden section; null: more compute than this text can use
  const [N, D] = optimal(f, C), along = x => repeatedLoss(f, Math.exp(x), tokens(Math.exp(x), C), unique);
  if (unique >= D) return [N, D];
  let low = Math.log(N) - 3, high = Math.log(N) + 2 * Math.log(D / unique) + 1;
  while (high - low > 1e-9) {
    const step = (Math.sqrt(5) - 1) / 2 * (high - low);
    [low, high] = along(high - step) < along(low + step) ? [low, low + step] : [high - step, high];
  }
  const n = Math.exp(low), d = tokens(n, C);
  return d / unique - 1 > 20 * data.R_D ? null : [n, d];
}

function advice(f, C) { // of a published law
  const at = C => [f.k_N * C ** f.a, f.k_D * C ** f.b], x = Math.log(C);
  if (f.E) return optimal(f, C);
  return at(f.flops_convention === "6nd" ? bisect(six => flops(...at(six)) > C, x - 7, x + 7) : C);
}

const shows = {params: count, tokens: count, tokens_per_param: three, loss: v => v.toFixed(4)};
const run = ([N, D]) => ({params: N, tokens: D, tokens_per_param: D / N});

function percentile(values, share) { // linear between values
  const sorted = values.sort((a, b) => a - b), x = share * (sorted.length - 1), i = Math.floor(x);
  return sorted[i] + (x - i) * (sorted[Math.ceil(x)] - sorted[i]);
}

function answers({C, serve, unique}) {
  const best = optimal(own, C), L = loss(own, ...best), ends = {};
  for (const name in shows) if (name + "_low" in columns) ends[name] = [at(name + "_low", C), at(name + "_high", C)];
  const found = [{mark: "best", name: "lowest loss", ...run(best), loss: L, ends, note: beyond(C)}];
  if (serve > 0) {
    const least = toServe(own, C, serve), drawn = data.replicates.map(f => run(toServe(f, C, serve))), ends = {};
    for (const name in drawn[0]) ends[name] = [0.025, 0.975].map(end => percentile(drawn.map(one => one[name]), end));
    const note = `compute saved ${(100 * least[2]).toFixed(1)}%`;
    found.push({mark: "serve", name: `to serve ${count(serve)} tokens`, ...run(least), loss: L, ends, note});
  }
  if (unique > 0) {
    const most = withText(own, C, unique), name = `on ${count(unique)} unique tokens`;
    const note = most ? `epochs ${three(Math.max(most[1] / unique, 1))}` : "too few for this compute";
    found.push({mark: "unique", name, note, ...(most && {...run(most), loss: repeatedLoss(own, ...most, unique)})});
  }
  return [...found, ...data.published.map(f => ({name: f.name, ...run(advice(f, C))}))];
}

function tableRow({mark = "", name, ends = {}, note = "", ...found}) {
  const range = name => ends[name] ? ` <span class="ci">${ends[name].map(shows[name]).join(" \u2013 ")}</span>` : "";
  const cells = Object.keys(shows).map(name => name in found ? shows[name](found[name]) + range(name) : "\u2013");
  cells.unshift(`${mark && `<i class="${mark}"></i>`}${name} <span class="beyond">${note}</span>`);
  return `<tr data-found='${JSON.stringify({...found, ends})}'><td>${cells.join("</td><td>")}</td></tr>`;
}

function plot(marks, {C, unique}, {clientWidth, clientHeight}) { // loss against N, up to a factor of 12 from the marks
  const W = clientWidth - 58, H = clientHeight - 30, N = marks.map(one => one.params);
  const along = n => [n, loss(own, n, tokens(n, C))], limited = n => [n, repeatedLoss(own, n, tokens(n, C), unique)];
  const seen = [...marks.map(one => one.loss), along(N[0] / 12)[1], along(N[0] * 12)[1], ...(marks[0].ends.loss ?? [])];
  const y1 = Math.max(...seen), y0 = 1.1 * Math.min(...seen) - 0.1 * y1;
  const x0 = Math.log10(Math.min(...N) / 12), x1 = Math.log10(Math.max(...N) * 12);
  const x = N => (Math.log10(N) - x0) / (x1 - x0) * W, y = L => (y1 - L) / (y1 - y0) * H;
  const path = (kind, points) => `<path class="${kind}" d="M${points.map(([N, L]) => `${x(N)} ${y(L)}`).join("L")}"/>`;
  const circle = (kind, N, L, r) => `<circle class="${kind}" cx="${x(N)}" cy="${y(L)}" r="${r}"/>`;
  const ten = 10 ** Math.floor(Math.log10((y1 - y0) / 6)), step = ten * [2, 5, 10].find(k => 6 * k * ten > y1 - y0);
  const curve = (kind, f) => path(kind, Array.from({length: 121}, (_, k) => f(10 ** (x0 + (x1 - x0) * k / 120))));
  let axes = "", inside = curve("along", along);
  if (unique > 0 && unique < marks[0].tokens) inside += curve("limited", limited);
  for (let L = Math.ceil(y0 / step) * step; L < y1; L += step)
    axes += `<path d="M0 ${y(L)}H${W}"/><text class="loss" x="-6" y="${y(L) + 4}">${Number(L.toPrecision(6))}</text>`;
  for (const digit of W > 120 * (x1 - x0) ? [1, 2, 5] : [1])
    for (let n = digit * 10 ** Math.floor(x0); x(n) < W; n *= 10)
      if (x(n) > 0) axes += `<path d="M${x(n)} 0V${H}"/><text x="${x(n)}" y="${H + 18}">${count(n)}</text>`;
  for (const [n, spent, L] of data.runs) inside += circle(Math.abs(spent / C - 1) < 0.1 ? "near" : "far", n, L, 3.5);
  for (const {mark, params: n, loss: L, ends} of marks) {
    if (ends?.params) inside += path(mark, ends.params.map(end => [end, L]));
    if (ends?.loss) inside += path(mark, ends.loss.map(end => [n, end]));
    inside += circle(mark, n, L, 5);
  }
  return `<g transform="translate(50 6)">${axes}<svg width="${W}" height="${H}">${inside}</svg></g>`;
}

const form = id("slider-form"), boxes = ["C", "serve", "unique"].map(name => form.elements[name]);

function show() {
  const asked = Object.fromEntries(boxes.map(box => [box.name, number(box.value)]));
  for (const box of boxes) {
    const value = asked[box.name], slider = box.nextElementSibling;
    box.ariaInvalid = !(value >= 0);
    slider.value = value > 0 ? Math.log10(value) : slider.min;
    slider.ariaValueText = box.value || box.placeholder;
  }
  const found = asked.C >= columns.C[0] && asked.C <= columns.C.at(-1) ? answers(asked) : [];
  id("slider-rows").innerHTML = found.map(tableRow).join("") || "<tr><td colspan=5>Too far from these runs.</td></tr>";
  id("slider-plot").innerHTML = found.length ? plot(found.filter(one => one.loss), asked, id("slider-plot")) : "";
}

function fromHash() {
  const given = new URLSearchParams(location.hash.slice(1).replaceAll("+", ""));
  for (const box of boxes) box.value = given.get(box.name) ?? box.defaultValue;
  show();
}

form.addEventListener("input", ({target: {type, value, min, previousElementSibling: box}}) => {
  if (type === "range") box.value = value === min && box.placeholder ? "" : three(10 ** value).toExponential();
  show();
});
form.addEventListener("change", () => history.replaceState(null, "", "#" + new URLSearchParams(new FormData(form))));
addEventListener("hashchange", fromHash);
addEventListener("resize", show);
fromHash();
