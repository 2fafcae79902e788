// What the interactive pages have in common: the way from page to page, menus, dialogs, tabs, and short messages.
const PAGES = { mail: "Mail", tasks: "Tasks", files: "Files", calendar: "Calendar", orders: "Orders", shop: "Shop", handbook: "Handbook", settings: "Settings" };
const $ = (selector, inside = document) => inside.querySelector(selector);
const $$ = (selector, inside = document) => [...inside.querySelectorAll(selector)];
const here = location.pathname.split("/").pop().replace(".html", "");
const el = (html) => { const box = document.createElement("template"); box.innerHTML = html.trim(); return box.content.firstElementChild; };

$("nav").innerHTML = Object.entries(PAGES).map(([page, name]) => `<a href="${page}.html"${page === here ? ' aria-current="page"' : ""}>${name}</a>`).join("");
document.body.append(el('<div id="toast" role="status"></div>'));
let toastTimer = 0;
const toast = (text) => { $("#toast").textContent = text; clearTimeout(toastTimer); toastTimer = setTimeout(() => { $("#toast").textContent = ""; }, 1300); };

const closeMenus = () => {
  $$("[role=menu]").forEach((menu) => { menu.hidden = true; });
  $$("[aria-haspopup=menu]").forEach((button) => button.setAttribute("aria-expanded", "false"));
};
const menuOf = (button) => $("[role=menu]", button.parentElement);
document.addEventListener("click", (event) => {
  const opener = event.target.closest("[aria-haspopup=menu]");
  const wasOpen = opener && !menuOf(opener).hidden;
  closeMenus();
  if (opener && !wasOpen) { menuOf(opener).hidden = false; opener.setAttribute("aria-expanded", "true"); }
  const dialog = event.target.closest("[data-dialog]");
  if (dialog) $("#" + dialog.dataset.dialog).showModal();
  if (event.target.closest("[data-close]")) event.target.closest("dialog").close();
  const tab = event.target.closest("[role=tab]");
  if (tab) {
    $$("[role=tab]", tab.parentElement).forEach((other) => other.setAttribute("aria-selected", String(other === tab)));
    tab.dispatchEvent(new CustomEvent("chosen", { bubbles: true }));
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") closeMenus();
  const dialog = event.target.closest?.("dialog[open]");
  if (event.key === "Enter" && dialog && event.target.matches("input")) $(".primary", dialog).click();
});
const menu = (name, items, side = "") => `<span class="anchor"><button aria-haspopup="menu" aria-expanded="false">${name}</button>
  <div role="menu" class="${side}" hidden>${items.map((item) => `<button role="menuitem">${item}</button>`).join("")}</div></span>`;
