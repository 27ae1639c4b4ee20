/*
 * Makes each process that it is preloaded into a subscriber of its own MMU notifiers, so that the
 * kernel traces what it announces: a KVM virtual machine without memory or a thread to run it. The
 * mapping of the virtual CPU alone keeps the machine alive; no descriptor stays open.
 *
 * Needs syscall(2) and getenv(3) of whatever libc the process has, and nothing else: it is linked
 * without any, so that it loads into programs of glibc and musl alike.
 *
 * What it has done is appended to the file MMUNOTIFY_RECORD_MAPS: "@NS TID KIND ERRNO\n" and a copy
 * of /proc/self/maps, in as many pieces as it takes; KIND is S at start, F after fork, E at exit.
 * Who may not open /dev/kvm gets it from the recorder's abstract socket MMUNOTIFY_RECORD_KVM.
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>

extern long syscall(long number, ...);
extern char *getenv(const char *name);
extern int __register_atfork(void (*)(void), void (*)(void), void (*)(void), void *)
	__attribute__((weak));
extern int pthread_atfork(void (*)(void), void (*)(void), void (*)(void)) __attribute__((weak));

static void *const here = (void *)&here;
static char maps_path[128], kvm_socket[100];
static char text[1 << 15];

static char *number(char *at, unsigned long value)
{
	char digits[20];
	int count = 0;

	do
		digits[count++] = '0' + value % 10;
	while (value /= 10);
	while (count)
		*at++ = digits[--count];
	return at;
}

/* A variable, before the program changes or overwrites its environment. */
static void keep(char *copy, int size, const char *name)
{
	const char *value = getenv(name);

	while (value && *value && --size)
		*copy++ = *value++;
}

/* /dev/kvm from the recorder, which may open it. */
static int borrow(void)
{
	struct sockaddr_un address = { .sun_family = AF_UNIX };
	char byte, control[CMSG_SPACE(sizeof(int))] __attribute__((aligned(8)));
	struct iovec data = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &data, .msg_iovlen = 1,
		.msg_control = control, .msg_controllen = sizeof(control),
	};
	int length = 0, result = -1, sock;

	/* An abstract name begins with a zero. */
	for (; kvm_socket[length]; length++)
		address.sun_path[length + 1] = kvm_socket[length];
	sock = syscall(SYS_socket, AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (sock < 0)
		return -1;
	if (!syscall(SYS_connect, sock, &address,
		     __builtin_offsetof(struct sockaddr_un, sun_path) + 1 + length) &&
	    syscall(SYS_recvmsg, sock, &message, MSG_CMSG_CLOEXEC) == 1 &&
	    message.msg_controllen >= CMSG_LEN(sizeof(int)))
		result = *(int *)CMSG_DATA((struct cmsghdr *)control);
	syscall(SYS_close, sock);
	return result;
}

/* Returns 0 or an errno. */
static int subscribe(void)
{
	long kvm, vm = -1, cpu = -1, size, page = -1;
	int error = 0;

	kvm = syscall(SYS_openat, AT_FDCWD, "/dev/kvm", O_RDWR | O_CLOEXEC, 0);
	if (kvm < 0) {
		error = errno;
		kvm = borrow();
	}
	if (kvm < 0)
		return error;
	vm = syscall(SYS_ioctl, kvm, KVM_CREATE_VM, 0);
	if (vm >= 0)
		cpu = syscall(SYS_ioctl, vm, KVM_CREATE_VCPU, 0);
	if (cpu >= 0) {
		size = syscall(SYS_ioctl, kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
		page = syscall(SYS_mmap, 0, size, PROT_READ, MAP_SHARED, cpu, 0);
	}
	error = page == -1 ? errno : 0;
	if (page != -1)
		syscall(SYS_madvise, page, size, MADV_DONTFORK);
	if (cpu >= 0)
		syscall(SYS_close, cpu);
	if (vm >= 0)
		syscall(SYS_close, vm);
	syscall(SYS_close, kvm);
	return error;
}

static void tell(char kind, int error)
{
	struct timespec now;
	char *body;
	long maps, out, got = 0;

	if (!*maps_path)
		return;
	maps = syscall(SYS_openat, AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC, 0);
	out = syscall(SYS_openat, AT_FDCWD, maps_path, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
	if (out >= 0) {
		syscall(SYS_clock_gettime, CLOCK_MONOTONIC, &now);
		text[0] = '@';
		body = number(text + 1, now.tv_sec * 1000000000UL + now.tv_nsec);
		*body++ = ' ';
		body = number(body, syscall(SYS_gettid));
		*body++ = ' ';
		*body++ = kind;
		*body++ = ' ';
		body = number(body, error);
		*body++ = '\n';
		do {
			char *end = body;

			while (end + 4096 <= text + sizeof(text) &&
			       (got = maps < 0 ? 0 : syscall(SYS_read, maps, end, 4096)) > 0)
				end += got;
			syscall(SYS_write, out, text, end - text);
		} while (got > 0);
		syscall(SYS_close, out);
	}
	if (maps >= 0)
		syscall(SYS_close, maps);
}

static void forked(void)
{
	int saved = errno;

	tell('F', subscribe());
	errno = saved;
}

__attribute__((constructor)) static void started(void)
{
	keep(maps_path, sizeof(maps_path), "MMUNOTIFY_RECORD_MAPS");
	keep(kvm_socket, sizeof(kvm_socket), "MMUNOTIFY_RECORD_KVM");
	if (__register_atfork)
		__register_atfork(0, 0, forked, here);
	else if (pthread_atfork)
		pthread_atfork(0, 0, forked);
	tell('S', subscribe());
}

__attribute__((destructor)) static void ended(void)
{
	tell('E', 0);
}
