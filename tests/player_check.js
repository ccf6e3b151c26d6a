// Plays the user in the page that `visualize.py movie --out x.html` wrote; test_visualize.py puts it there.
// What it saw goes into the page, as JSON, for Chromium's --dump-dom.
const wait = milliseconds => new Promise(done => setTimeout(done, milliseconds));
const captions = () => [...document.querySelectorAll("figcaption")].map(caption => caption.textContent);
const canvas = id => document.querySelector(`#${id} canvas`);
const pixels = (target = canvas("axial")) => {
  const data = target.getContext("2d").getImageData(0, 0, target.width, target.height).data;
  return Array.from({length: data.length / 4}, (_, i) => data.slice(4 * i, 4 * i + 3).join());
};
const same = first => pixels().every((pixel, i) => pixel === first[i]);
const count = colour => pixels().filter(pixel => pixel === colour).length;
const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const mouse = (target, type, u, v, more = {}) => {  // at a place from 0 to 1 in the target
  const box = target.getBoundingClientRect(), [x, y] = [box.left + u * box.width, box.top + v * box.height];
  const Kind = {wheel: WheelEvent, click: MouseEvent, dblclick: MouseEvent}[type] || PointerEvent;
  target.dispatchEvent(new Kind(type, {clientX: x, clientY: y, bubbles: true, cancelable: true, ...more}));
};
const SKY = "86,180,233", YELLOW = "240,228,66", VERMILION = "213,94,0", PURPLE = "204,121,167";

(async () => {
  const seen = {};
  while (!document.body.dataset.ready) await wait(50);
  const axial = canvas("axial"), first = pixels();
  seen.title = [document.title, at("title").textContent, at("told").textContent.includes("Dice of this slice 0.")];
  seen.start = captions();
  seen.sizes = planes.map(plane => [plane.wide, plane.high]);
  seen.colours = [SKY, YELLOW, VERMILION, PURPLE].map(count);
  seen.fills = axial.clientHeight / innerHeight;
  seen.scrolls = document.documentElement.scrollWidth > innerWidth;  // to the side

  mouse(axial, "wheel", 0.5, 0.5, {deltaY: 100});
  seen.wheel = [captions()[0], same(first)];
  mouse(axial, "wheel", 0.5, 0.5, {deltaY: -100});
  seen.back = same(first);

  const drag = (u, v) => {
    mouse(axial, "pointerdown", 0.3, 0.3);
    mouse(axial, "pointermove", u, v, {buttons: 1});
    mouse(axial, "pointerup", u, v);
    mouse(axial, "click", u, v, {detail: 1});  // as a browser does after each drag
  };
  drag(0.3, 0.7);
  seen.darker = [view.brightness < 0, view.contrast === 1, same(first), captions().join() === seen.start.join()];
  drag(0.7, 0.3);
  seen.contrast = view.contrast > 1;
  mouse(axial, "pointerdown", 0.1, 0.1);
  mouse(axial, "pointerup", 0.1, 0.1);
  mouse(axial, "click", 0.1, 0.1, {detail: 1});
  seen.went = captions();
  mouse(axial, "click", 0.1, 0.1, {detail: 2});
  mouse(axial, "dblclick", 0.1, 0.1, {detail: 2});
  seen.reset = same(first);

  press("2");
  seen.prediction = count(SKY);
  press("3");
  press("4");
  seen.errors = [count(YELLOW), count(VERMILION)];
  press("5");
  seen.truth = count(PURPLE);
  for (const key of "5432") press(key);
  seen.on_again = same(first);
  press("1");
  seen.scan = at("scan").checked;
  press("1");
  press("6");
  seen.cross = same(first);
  press("6");
  at("opacity").value = 0;
  at("opacity").dispatchEvent(new Event("input"));
  seen.opacity = same(first);
  at("opacity").value = 45;
  at("opacity").dispatchEvent(new Event("input"));

  press("ArrowRight");
  seen.right = captions()[0];
  press("ArrowLeft");
  press("ArrowLeft");
  seen.left = captions()[0];
  mouse(at("strip"), "pointerdown", 0.01, 0.5);
  seen.strip = captions()[0];
  mouse(at("strip"), "pointerdown", 0.72, 0.5);
  seen.jump = captions()[0];
  seen.poor = new Set(pixels(at("strip"))).has(VERMILION);  // a slice of low Dice is marked
  planes[1].caption.click();
  press("ArrowRight");
  seen.coronal = [captions().sort()[1], document.querySelector(".large").id];

  press(" ");
  await wait(1000);
  press(" ");
  const stopped = position.join();
  await wait(300);
  seen.play = [captions().sort()[1] !== seen.coronal[0], position.join() === stopped];
  seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.errors_told = window.told;
  element(document.body, "pre", {id: "seen", textContent: JSON.stringify(seen)});
})();
